"""Files that somebody made up: one clear error each, no code run, no escape, no memory taken on their word."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peak_memory import peak_memory, reset_peak
from smolforge.checkpoint.commit import newest_whole, read_manifest, verify
from smolforge.checkpoint.format import read_config, read_generation_defaults
from smolforge.checkpoint.locate import load_model
from smolforge.checkpoint.state import load_state
from smolforge.checkpoint.weights import check_safetensors, is_inside, read_safetensors, read_weights
from smolforge.errors import CheckpointError, SmolforgeError

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "header too small"),
        (b"\x08\0\0", "header too small"),
        (struct.pack("<Q", 2**63) + b"{}", "header too large|invalid header length"),
        (struct.pack("<Q", 2**40) + b"{}", "header too large|invalid header length"),
        (safetensors_bytes({}, length=3), "header too large|invalid header length"),
        (safetensors_bytes(b"not json"), "invalid (JSON|UTF-8)"),
        (safetensors_bytes(b"\xff\xfe"), "invalid (JSON|UTF-8)"),
        (safetensors_bytes(b"[" * 200_000), "invalid (JSON|UTF-8)"),
        (safetensors_bytes([1]), "invalid JSON"),
        (safetensors_bytes({"a": entry()}), "not fully covered"),
        (safetensors_bytes({"a": entry()}, b"\0" * 9), "not fully covered"),
        (safetensors_bytes({"a": entry(shape=(3,))}, b"\0" * 8), "invalid shape"),
        (safetensors_bytes({"a": entry(shape=(2**61, 2**61), offsets=(0, 8))}, b"\0" * 8), "overflow"),
        (safetensors_bytes({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, b"\0" * 8), "not fully covered"),
        (safetensors_bytes({"a": entry(shape=(-2, -1))}, b"\0" * 8), "invalid (value|type|shape)"),
        (safetensors_bytes({"a": entry(shape=(2.0,))}, b"\0" * 8), "invalid (value|type|shape)"),
        (safetensors_bytes({"a": entry(shape=(True, 2))}, b"\0" * 8), "invalid (value|type|shape)"),
        (safetensors_bytes({"a": entry(shape=[1] * 99)}, b"\0" * 4), "invalid (value|type|shape)"),
        (safetensors_bytes({"a": entry(dtype="PICKLE")}, b"\0" * 8), "PICKLE"),
        (safetensors_bytes({"a": entry(dtype=["F32"])}, b"\0" * 8), "invalid type"),
        (safetensors_bytes({"a": entry(offsets=(8, 0))}, b"\0" * 8), "invalid offset"),
        (safetensors_bytes({"a": entry(offsets=(0, 8, 16))}, b"\0" * 8), "invalid (length|value)"),
        (safetensors_bytes({"a": entry(offsets=(-8, 0))}, b"\0" * 8), "invalid (length|value)"),
        (safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "invalid offset"),
        (safetensors_bytes({"a": entry(), "b": entry()}, b"\0" * 8), "invalid offset"),
        (safetensors_bytes({"a": entry(offsets=(4, 12))}, b"\0" * 12), "invalid offset"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "missing field|invalid type"),
        (safetensors_bytes({"a": 5}), "missing field|invalid type"),
        (safetensors_bytes(b'{"a":' + json.dumps(entry()).encode() + b',"a":5}', b"\0" * 8), "invalid JSON"),
    ],
)  # fmt: skip
def test_each_forged_header_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_safetensors(path)
    assert "model.safetensors" in str(caught.value)


def test_a_right_header_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {
        "b": entry(offsets=(8, 16)),
        "a": entry(),
        "none": entry(shape=(0, 3), offsets=(8, 8)),
        "__metadata__": {},
    }
    path.write_bytes(safetensors_bytes(header, struct.pack("<4f", 1, 2, 3, 4)))
    tensors = read_safetensors(path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [1, 2], "b": [3, 4], "none": []}


FORGED = """
import sys
from pathlib import Path
import numpy, safetensors
from peak_memory import peak_memory, reset_peak
from smolforge.checkpoint.weights import check_safetensors
before = reset_peak()
for path in map(Path, sys.argv[1:]):
    try:
        check_safetensors(path)
    except Exception as error:
        assert type(error).__name__ == "CheckpointError", error
    else:
        raise SystemExit("accepted " + str(path))
print(peak_memory() - before)
"""


def test_a_forged_length_takes_no_memory(tmp_path: Path) -> None:
    """Measured in a process of its own; the files claim exabytes, and one is a sparse terabyte of nothing."""
    contents = {
        "length": struct.pack("<Q", 2**60) + b"{}",
        "shape": safetensors_bytes({"a": entry(shape=(2**40,), offsets=(0, 2**42))}),
        "many": safetensors_bytes({"a": entry(shape=(2**20, 2**20), offsets=(0, 2**42))}, b"\0" * 64),
    }
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / f"{name}.safetensors")
        paths[-1].write_bytes(content)
    sparse = tmp_path / "sparse.safetensors"
    with sparse.open("wb") as file:
        file.write(struct.pack("<Q", 2**39))  # a header within the size of the file, far above the limit
        file.truncate(2**40)
    command = [sys.executable, "-c", FORGED, *map(str, paths), str(sparse)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    peak_memory()  # skips where it cannot be known
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    assert int(done.stdout) < 20e6


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "sub/x.safetensors", "..", ".", "",
     "..\\secret.safetensors", "c:x.safetensors", "x.safetensors\0", "model.bin"],
)  # fmt: skip
def test_a_shard_index_cannot_leave_the_directory(tiny: Any, tmp_path: Path, name: str) -> None:
    tiny.write(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": dict.fromkeys(tiny.module.state_dict(), name)}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a shard of this directory"):
        read_weights(tmp_path / "m")


def test_a_shard_and_a_file_of_a_folder_are_inside() -> None:
    assert is_inside("model-00001-of-00002.safetensors") and is_inside("training/state.json")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\b", "\0", "a\nb", "x" * 300, ".", ""])
def test_a_manifest_cannot_name_what_is_outside(checkpoints: Path, name: str) -> None:
    from smolforge.checkpoint.commit import _manifest_text

    directory = checkpoints / "step-00000003"
    (directory / "manifest.json").write_text(_manifest_text(3, {name: {"size": 0, "sha256": "0" * 64}}))
    with pytest.raises(CheckpointError, match="not a file inside"):
        read_manifest(directory)


@pytest.mark.parametrize("value", [{"size": "0"}, {"size": 0}, 5, None, {"size": 0, "sha256": "x", "more": 1}])
def test_a_manifest_with_odd_entries_is_damaged(checkpoints: Path, value: Any) -> None:
    from smolforge.checkpoint.commit import _manifest_text

    directory = checkpoints / "step-00000003"
    (directory / "manifest.json").write_text(_manifest_text(3, {"config.json": value}))
    assert verify(directory) and newest_whole(checkpoints) == checkpoints / "step-00000002"


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["SMOLFORGE_BOMB"],))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "training.pkl"])
def test_pickle_is_never_read(model_dir: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLFORGE_BOMB", str(tmp_path / "exploded"))
    (model_dir / "model.safetensors").unlink()
    (model_dir / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load_model(model_dir)
    assert name in str(caught.value) and "save_pretrained" in str(caught.value)
    (model_dir / name).rename(model_dir / "model.safetensors")
    with pytest.raises(CheckpointError):
        load_model(model_dir)
    assert not (tmp_path / "exploded").exists()


def test_code_that_a_config_points_at_is_not_run(model_dir: Path) -> None:
    """transformers' auto_map (trust_remote_code) is never followed."""
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    (model_dir / "evil.py").write_text("raise SystemExit('run')")
    load_model(model_dir)


def test_a_config_that_claims_a_giant_takes_no_memory(tiny: Any, model_dir: Path) -> None:
    path = model_dir / "config.json"
    values = json.loads(path.read_text())
    values |= {"vocab_size": 1 << 24, "hidden_size": 1 << 17, "num_hidden_layers": 1024, "num_attention_heads": 4096,
               "num_key_value_heads": 4096, "head_dim": 1 << 14}  # fmt: skip
    path.write_text(json.dumps(values))
    before = reset_peak()
    with pytest.raises(CheckpointError, match="missing"):
        load_model(model_dir)
    assert peak_memory() - before < 300e6


def test_special_files_are_not_read(checkpoints: Path) -> None:
    directory = checkpoints / "step-00000003"
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")  # opening it would wait for ever
    assert any("model.safetensors" in problem for problem in verify(directory))


# ---- fuzzing: whatever the bytes, the answer is a SmolforgeError or a right result ------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def only_clear_errors(call: Any, *args: Any) -> None:
    try:
        call(*args)
    except SmolforgeError as error:
        assert str(error)


@pytest.fixture(scope="module")
def valid(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("valid")
    tiny.write(directory)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@FUZZ
@given(changes=st.data())
def test_fuzz_config(valid: Path, place: Path, changes: Any) -> None:
    for name, read in (("config.json", read_config), ("generation_config.json", read_generation_defaults)):
        values = json.loads((valid / name).read_text())
        keys = [*sorted(values), "rope_scaling", "quantization_config", "temperature", "top_k"]
        values |= changes.draw(st.dictionaries(st.sampled_from(keys), JSON, min_size=1, max_size=3))
        (place / name).write_text(json.dumps(values))
        only_clear_errors(read, place)


@FUZZ
@given(content=st.binary(max_size=200))
def test_fuzz_bytes_of_every_file(valid: Path, place: Path, content: bytes) -> None:
    for name in ("config.json", "generation_config.json", "manifest.json", "model.safetensors.index.json"):
        (place / name).write_bytes(content)
    (place / "model.safetensors").unlink(missing_ok=True)
    only_clear_errors(read_config, place)
    only_clear_errors(read_generation_defaults, place)
    only_clear_errors(read_manifest, place)
    only_clear_errors(read_weights, place)
    (place / "model.safetensors").write_bytes(content)
    only_clear_errors(read_weights, place)


@FUZZ
@given(
    header=st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"),
        JSON | st.fixed_dictionaries({
            "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", "X"]) | JSON,
            "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=3) | JSON,
            "data_offsets": st.lists(st.integers(-1, 64) | st.integers(), min_size=2, max_size=2) | JSON,
        }),
        max_size=3,
    ),
    data=st.binary(max_size=64),
    delta=st.sampled_from([0, 0, 0, 1, -1, 2**62]),
)  # fmt: skip
def test_fuzz_safetensors(place: Path, header: Any, data: bytes, delta: int) -> None:
    path = place / "fuzz.safetensors"
    raw = json.dumps(header).encode()
    length = max(0, len(raw) + delta)
    path.write_bytes(safetensors_bytes(raw, data, length))
    try:
        tensors = read_safetensors(path)
    except SmolforgeError:
        return
    # What is accepted is read in full and is exactly as large as the file says.
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == len(raw) + len(data) - length
    assert all(t.clone().numel() == t.numel() for t in tensors.values())


@FUZZ
@given(index=JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=4), st.text(max_size=8))}))
def test_fuzz_shard_index(place: Path, index: Any) -> None:
    (place / "model.safetensors").unlink(missing_ok=True)
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    only_clear_errors(read_weights, place)


@FUZZ
@given(
    tree=st.recursive(
        JSON,
        lambda inner: st.dictionaries(
            st.sampled_from(["$tensor", "$tuple", "$dict", "$int", "$float", "$bytes", "$array", "$x", "a"]), inner,
            min_size=1, max_size=2,
        ),
        max_leaves=5,
    )
)  # fmt: skip
def test_fuzz_state(valid: Path, place: Path, tree: Any) -> None:
    directory = place / "training"
    directory.mkdir(exist_ok=True)
    (directory / "tensors.safetensors").write_bytes((valid / "training" / "tensors.safetensors").read_bytes())
    (directory / "state.json").write_text(json.dumps({"format": 1, "tree": tree}))
    only_clear_errors(load_state, directory)


@FUZZ
@given(content=JSON)
def test_fuzz_manifest(place: Path, content: Any) -> None:
    from smolforge.checkpoint.commit import _manifest_text

    (place / "manifest.json").write_text(json.dumps(content))
    assert verify(place)
    if isinstance(content, dict):
        (place / "manifest.json").write_text(_manifest_text(1, content))
        only_clear_errors(read_manifest, place)
        verify(place)


def test_fuzz_whole_directories(tiny: Any, tmp_path: Path) -> None:
    """Damage anywhere in a directory without a manifest: loads with the right shapes or is refused clearly."""
    generator, refused = random.Random(1), 0
    tiny.write(tmp_path)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    contents = {name: (tmp_path / name).read_bytes() for name in names}
    for _ in range(150):
        name = generator.choice(names)
        data = bytearray(contents[name])
        head = len(data) if generator.random() < 0.5 else min(len(data), 400)  # headers are where it hurts
        for _ in range(generator.randrange(1, 4)):
            place = generator.randrange(head)
            change = generator.choice([b"", b"\xff", b"{", b'"', b"9", b"-", bytes([generator.randrange(256)])])
            data[place : place + generator.randrange(1, 3)] = change
        (tmp_path / name).write_bytes(data)
        try:
            module, tokenizer, _ = load_model(tmp_path)
            tokenizer.decode(tokenizer.encode("the cat"))
            assert {n: p.shape for n, p in module.named_parameters()} == {
                n: p.shape for n, p in tiny.module.named_parameters()
            }
        except SmolforgeError:
            refused += 1
        (tmp_path / name).write_bytes(contents[name])
    assert refused > 50
    assert torch.equal(load_model(tmp_path)[0].output_weight, tiny.module.output_weight)


def test_check_safetensors_of_a_directory_or_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            check_safetensors(path)
