"""The pipeline. To add a stage, a format or an exporter: write its file, add its line."""

from typing import Any

from edgeft.stage import Stage
from edgeft.stages import (
    base,
    data,
    device,
    export_bundle,
    export_deb,
    export_oci,
    export_ollama,
    gate,
    gguf,
    imatrix,
    merge,
    pack,
    preflight,
    quantize_gguf,
    reference,
    serve,
    train,
    tune,
    verify,
)

STAGES: tuple[Stage[Any], ...] = (
    device.STAGE,
    base.STAGE,
    serve.STAGE,
    preflight.STAGE,
    data.STAGE,
    gguf.OF_BASE,
    imatrix.OF_BASE,
    quantize_gguf.OF_BASE,
    train.STAGE,
    reference.STAGE,
    merge.STAGE,
    gguf.STAGE,
    imatrix.STAGE,
    quantize_gguf.STAGE,
    verify.START,
    tune.STAGE,
    reference.TUNED,
    pack.STAGE,
    verify.STAGE,
    gate.STAGE,
    export_bundle.STAGE,
    export_deb.STAGE,
    export_oci.STAGE,
    export_ollama.STAGE,
)
