"""The command line from outside: quick help, JSON that parses, codes that mean something."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import tiny_file

import smolforge
from smolforge import cli
from smolforge.generation import Engine

HEAVY = ("torch", "transformers", "pyarrow", "gradio", "numpy", "pydantic", "rich")


@pytest.mark.parametrize("words", [["--help"], *([verb, "--help"] for verb in cli.VERBS)], ids=" ".join)
def test_help_is_quick_and_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys, runpy\nsys.argv[1:] = " + repr(words) + "\n"
        "try:\n    runpy.run_module('smolforge', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "[]"
    assert "usage: smolforge" in done.stdout
    # CPU time, not wall-clock: what a busy machine does to others is no fault of ours.
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.3


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    assert cli.run(["train", tiny_file(place), "--out", str(place / "run"), "--steps", "4"]) == 0
    return place / "run"


def test_json_outputs_parse(run: Path, capsys) -> None:
    def output(*words: str) -> dict:
        capsys.readouterr()
        assert cli.run(words) == 0
        return json.loads(capsys.readouterr().out)

    assert output("train", "--out", str(run), "--steps", "+1", "--json")["step"] == 5
    assert output("summary", "smollm2-135m", "--json")["parameters"] == 134_515_008
    assert output("summary", str(run), "--json")["sequence_length"] == 2048
    assert output("verify", str(run), "--json")["whole"]
    scores = output("eval", str(run), "--data", "tales", "--tokens", "2k", "--quantize", "int8", "--json")
    assert abs(scores["precisions"]["int8"]["price"]) < 0.005
    assert 0 < scores["entropy_bits_per_byte"] < scores["bits_per_byte"]
    texts = output("generate", str(run), "One", "Two", "--n", "2", "--max-tokens", "5", "--seed", "3", "--json")
    assert [(c["prompt"], c["choice"]) for c in texts["completions"]] == [
        ("One", 0),
        ("One", 1),
        ("Two", 0),
        ("Two", 1),
    ]
    documents = output("data", "which", str(run), "--step", "2", "--json")["documents"]
    assert documents and {"source", "file", "row_group", "row"} == set(documents[0])
    assert cli.run(["data", "which", str(run), "--step", "9000"]) == 2, "not the data of a step that never is"


def test_eval_scores_the_mixture_by_weight_and_each_source_by_itself(run: Path, tmp_path: Path, capsys) -> None:
    words = {"a.jsonl": "the cat sat on the mat. ", "b.jsonl": "§¶ 0123456789 ¤¥ "}
    a, b = (tmp_path / name for name in words)
    for path, text in zip((a, b), words.values(), strict=True):
        path.write_text("".join(json.dumps({"text": text * 3 + str(number)}) + "\n" for number in range(300)))

    def score(*sources: str) -> dict:
        capsys.readouterr()
        assert cli.run(["eval", str(run), "--data", *sources, "--tokens", "3k", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    alone = {str(path): score(str(path)) for path in (a, b)}
    both = score(f"{a}=0.9", f"{b}=0.1")
    for source, one in both["sources"].items():
        assert one == {key: alone[source][key] for key in one}, "as evaluated alone"
    low, high = sorted(one["bits_per_byte"] for one in alone.values())
    mixed = score(f"{a}=0.1", f"{b}=0.9")["bits_per_byte"]
    assert low < both["bits_per_byte"] < high and low < mixed < high and mixed != both["bits_per_byte"]
    assert "sources" not in alone[str(a)]
    assert cli.run(["eval", str(run), "--data", str(a), str(b), "--tokens", "3k"]) == 0
    assert f"of {b}: {alone[str(b)]['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def test_generate_streams_the_three_prompts(run: Path, capsys) -> None:
    assert cli.run(["generate", str(run), "--max-tokens", "4", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    for prompt in ("Once upon a time", "The future of artificial intelligence", "In the distant galaxy"):
        assert prompt in first
    assert cli.run(["generate", str(run), "--max-tokens", "4", "--seed", "1"]) == 0
    assert capsys.readouterr().out == first


def test_bytes_that_are_no_text_end_nothing(run: Path) -> None:
    def generate(*words: str, given: bytes = b"", encoding: str = "utf-8:strict") -> bytes:
        command = [sys.executable, "-m", "smolforge", "generate", str(run), *words, "--max-tokens", "2", "--seed", "1"]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, input=given, capture_output=True, env=environment)
        assert not done.returncode, done.stderr
        return done.stdout

    assert generate("-", given=b"caf\xe9\n").startswith("caf\ufffd".encode())
    assert generate(os.fsdecode(b"caf\xe9")).startswith("caf\ufffd".encode())
    assert generate("Once \u2728", encoding="latin-1").startswith(b"Once ?")
    assert generate("-", given=b"Once upon\n") == generate("Once upon")


def test_several_texts_are_those_of_json(run: Path, capsys) -> None:
    words = ["generate", str(run), "Once", "--max-tokens", "4", "--seed", str(2**64 - 1), "--n", "3"]
    assert cli.run([*words, "--json"]) == 0
    found = [one["text"] for one in json.loads(capsys.readouterr().out)["completions"]]
    assert cli.run(words) == 0
    assert capsys.readouterr().out == f"\n{'-' * 40}\n".join(f"Once{text}\n" for text in found)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--data", "tales", "--task-files", "x"), "--task-files"), (("--data", "tales", "--shots", "0"), "--shots"),
        (("--tasks", "a", "--quantize", "int4"), "--quantize"), (("--tasks", "a", "--held-out"), "--held-out"),
        (("--tasks", "a", "--tokens", "5"), "--tokens"),
    ],
)  # fmt: skip
def test_an_option_of_the_other_question_is_refused(run: Path, capsys, words, field) -> None:
    assert cli.run(["eval", str(run), *words]) == 2
    assert f"error: {field}: is an option of" in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_no_control_characters_of_a_model(run: Path, capsys, monkeypatch, is_terminal: bool) -> None:
    written = "a\x1b]0;title\x07b\x9bc\n\td"
    stream = Engine.stream
    monkeypatch.setattr(Engine, "stream", lambda *a, **k: (out._replace(text=written) for out in stream(*a, **k)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert cli.run(["generate", str(run), "Once", "--max-tokens", "1"]) == 0
    shown = "a\ufffd]0;title\ufffdb\ufffdc\n\td" if is_terminal else written
    assert capsys.readouterr().out == f"Once{shown}\n"


def test_the_version_is_that_of_the_package(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"smolforge {version('smolforge')}\n"


def test_python_loads_and_generates_as_the_command_line_does(run: Path, capsys) -> None:
    assert cli.run(["generate", str(run), "Once", "--max-tokens", "4", "--seed", "1", "--json"]) == 0
    (expected,) = json.loads(capsys.readouterr().out)["completions"]
    settings = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 4, "seed": 1}
    assert smolforge.generate(run, "Once", **settings) == expected["text"]
    model = smolforge.load(run)
    assert model.directory == (run / "checkpoints" / "last").resolve()
    assert model.generate("Once", **settings) == expected["text"]
    assert cli.run(["eval", str(run), "--data", "tales", "--tokens", "2k", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert asdict(smolforge.evaluate(run, "tales", tokens=2000)).items() <= scored.items()


def test_summary_shows_the_tree(capsys) -> None:
    assert cli.run(["summary", "smollm2-135m"]) == 0
    text = capsys.readouterr().out
    assert "(0-29): 30 x LlamaDecoderLayer(" in text
    assert "Total model parameters: 134,515,008" in text and "Tensors: 272" in text


def test_verify_names_the_damaged_file(run: Path, capsys) -> None:
    path = run / "checkpoints" / "last" / "tokenizer.json"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"]")
    try:
        assert cli.run(["verify", str(run)]) == 2
        assert "tokenizer.json" in capsys.readouterr().out
    finally:
        path.write_bytes(good)


def test_compare(run: Path, capsys, tmp_path) -> None:
    assert cli.run(["compare", str(run), str(run), "--html", str(tmp_path / "page.html")]) == 0
    assert "loss" in capsys.readouterr().out and (tmp_path / "page.html").stat().st_size > 1000
    assert cli.run(["compare", str(run), str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_held_out_text"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_native_code_is_built_where_asked(tmp_path, capsys) -> None:
    assert cli.run(["build-native", "--directory", str(tmp_path), "--json"]) == 0
    assert [Path(json.loads(capsys.readouterr().out)["library"])] == list(tmp_path.glob("*.so"))


def test_a_path_that_exists_is_a_source_even_with_an_equals_sign(tmp_path, monkeypatch) -> None:
    """Hive names its folders so: `--data year=2024` read it as the source `year` with a weight of 2024."""
    from smolforge.cli.options import parse_sources

    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2024").mkdir()
    assert parse_sources(["year=2024"]) == {"year=2024": 1.0}
    assert parse_sources(["year=2024=0.25", "notes.txt=0.5"]) == {"year=2024": 0.25, "notes.txt": 0.5}
    assert parse_sources(["month=3"]) == {"month": 3.0}
    signed = "https://host/a.jsonl?Signature=abc&Expires=1735689600"
    assert parse_sources([signed, "https://host/b.jsonl=2"]) == {signed: 1.0, "https://host/b.jsonl": 2.0}
