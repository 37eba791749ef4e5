"""A program in llama-server's place that answers with the sha256 of the files it loaded. Run with `python -I -S`.

What it does is written in the first line of the model: `crash` ends at once, `mute` never listens, `empty` and `broken`
answer with nothing or with one sign, `slow` loads for a while; anything else answers.
"""

import hashlib
import json
import socket
import sys
import time


def option(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else ""


def read(path):
    with open(path, "rb") as file:  # noqa: PTH123  pathlib takes longer to import than all of this
        return file.read()


model = read(option("--model"))
kind = model[:16].split(b"\n")[0].decode("latin-1")
said = "model " + hashlib.sha256(model).hexdigest()
if option("--lora"):
    said += " adapter " + hashlib.sha256(read(option("--lora"))).hexdigest()
said = {"empty": "", "broken": "G" * 40}.get(kind, said)
key = read(option("--api-key-file")).decode().strip() if option("--api-key-file") else ""
if kind == "crash":
    sys.exit(1)
if kind == "mute":
    time.sleep(3600)
if kind == "slow":
    time.sleep(0.3)
ANSWERS = {
    "/health": {"status": "ok"},
    "/props": {"model_path": option("--model")},
    "/slots": [{"id": 0, "is_processing": False}],
    "/v1/chat/completions": {"choices": [{"message": {"role": "assistant", "content": said}}]},
}
server = socket.create_server((option("--host"), int(option("--port"))), backlog=16)
while True:
    peer, _ = server.accept()
    with peer:
        head = b""
        while b"\r\n\r\n" not in head and (more := peer.recv(65536)):
            head += more
        head, _, body = head.partition(b"\r\n\r\n")
        if not head:
            continue
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        while len(body) < int(fields.get(b"content-length", 0)):
            body += peer.recv(65536)
        path = head.split(b" ")[1].decode()
        allowed = not key or path == "/health" or fields.get(b"authorization") == b"bearer " + key.encode()
        status = (
            "200 OK"
            if allowed and path in ANSWERS
            else "401 Unauthorized"
            if not allowed
            else "404 Not Found"
        )
        content = json.dumps(ANSWERS.get(path) if allowed else {}).encode()
        peer.sendall(
            f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
            + content
        )
