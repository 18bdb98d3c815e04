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

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of genuine tokenizers, configurations and text; tests that need it skip without it."""
    if not REAL_DATA.is_dir():
        pytest.skip("../shared/data is not on this machine")
    return REAL_DATA
