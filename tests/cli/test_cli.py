"""The commands as a user meets them: what they print, where, with which exit code."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mygpt
from mygpt.cli import app
from mygpt.text import name_of
from shell import Shell

pytestmark = pytest.mark.slow

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
TINY = (
    "--preset", "nano", "--embed-dim", "16", "--num-layers", "2", "--max-seq-len", "16",
    "--batch-size", "4",
)  # fmt: skip
COMMAND = [sys.executable, "-m", "mygpt"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run that tests only read."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fox.txt").write_text(TEXT)
    mygpt.train(
        folder / "fox.txt",
        output=folder / "run",
        preset="nano",
        embed_dim=16,
        num_layers=2,
        max_seq_len=16,
        steps=400,
        listener=lambda event: None,
        command="mygpt train fox.txt",
    )
    return folder / "run"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text(TEXT)


# --- train ---------------------------------------------------------------------------------


def test_train_prints_plain_lines_and_ends_with_what_to_do_next(shell: Shell) -> None:
    code, out, err = shell("train", "fox.txt", *TINY, "--steps", 10, "--print-every", 5)
    assert (code, err) == (0, "")
    assert re.search(
        r"^baselines: uniform 3\.\d{4}, unigram [23]\.\d{4} nats per token$", out, re.M
    )
    assert re.findall(r"^step +(\d+): loss = \d\.\d{4}  \(.*left\)$", out, re.M) == ["1", "5", "10"]
    assert re.search(r"^step +10: validation loss = \d\.\d{4} ", out, re.M)
    end = r"\na sample at temperature 0.8:\n  \| .+\nreport: runs/fox/report.html\nnext:\n"
    end += r"  mygpt generate -c runs/fox -p TEXT .*\n(  mygpt .*\n)*"
    assert re.search(f"{end}$", out, re.DOTALL)
    assert Path("runs/fox/report.html").stat().st_size < 2_000_000
    assert json.loads(Path("runs/fox/log.jsonl").read_text().splitlines()[0])["step"] == 1


def test_train_quiet_prints_nothing(shell: Shell) -> None:
    assert shell("train", "fox.txt", *TINY, "--steps", 2, "--quiet") == (0, "", "")


def test_train_resume_continues_a_run(shell: Shell) -> None:
    shell("train", "fox.txt", *TINY, "--steps", 4, "--output", "ckpt.pt")
    out = shell.printed("train", "--resume", "ckpt.pt", "--steps", 6)
    assert "resuming after step 4" in out
    assert "--output" in shell.refused("train", "--resume", "ckpt.pt", "--output", "x")
    assert "--overwrite" in shell.refused("train", "--resume", "ckpt.pt", "--overwrite")


def test_train_resume_takes_the_options_that_the_run_has(shell: Shell) -> None:
    """The command that began a run, with --resume before it, was refused for its own options."""
    same = [*TINY, "--tokenizer", "char", "--lr", 0.01, "--output", "r"]
    shell("train", "fox.txt", *same, "--steps", 4)
    shell("train", "fox.txt", *TINY, "--steps", 1, "--output", "based", "--overwrite")
    assert shell("train", "fox.txt", "--resume", "r", *same, "--steps", 6)[0] == 0
    assert shell("train", "--resume", "r", "--steps", 6, "--batch-size", "auto", "-q")[0] == 0
    for option, asked, has in (
        ("--batch-size", 2, 4),
        ("--lr", 0.5, 0.01),
        ("--embed-dim", 32, 16),
        ("--tokenizer", "byte", "char"),
        ("--tokenizer", "bpe:300", "char"),
        ("--preset", "small", "nano"),
        ("--encoding", "latin-1", None),
        ("--from", "based", None),
    ):
        said = shell.refused("train", "--resume", "r", option, asked)
        name = {"--from": "init_from"}.get(option, option[2:].replace("-", "_"))
        assert f"{name}={asked} cannot change when a run is resumed, and this one has {has}" in said
    assert "batch_size='x' must be" in shell.refused("train", "--resume", "r", "--batch-size", "x")


def test_a_finished_run_is_not_announced_again(shell: Shell) -> None:
    """Its table came again, as if it had been trained; an exit code of 0 is right for scripts."""
    shell("train", "fox.txt", *TINY, "--steps", 4, "--output", "r")
    report = Path("r/report.html").stat().st_mtime_ns
    code, out, err = shell("train", "--resume", "r")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert "r is finished, nothing to do: `mygpt report r` shows how it went" in out
    assert Path("r/report.html").stat().st_mtime_ns == report
    state = Path("r/last.state.safetensors").read_bytes()
    said = shell.refused("train", "--resume", "r", "--steps", 3)
    assert "steps=3 counts from the run's start, and the run has had 4: give more" in said
    assert Path("r/last.state.safetensors").read_bytes() == state, "its length stays as it was"


def test_texts_of_one_name_and_other_endings_have_runs_of_their_own() -> None:
    names = ["chat.txt", "chat.TXT.gz", "chat.csv", "chat.jsonl", "my.notes.txt", "chat"]
    runs = ["chat", "chat", "chat-csv", "chat-jsonl", "my.notes", "chat"]
    assert [name_of([name]) for name in names] == runs


@pytest.mark.parametrize(
    ("size", "verdict"),
    [
        (0, "no step was made: the weights are the initial ones"),
        (
            1,
            "nothing was validated: whether it learned or memorised is not known; give a longer "
            "text, or a --val-file",
        ),
    ],
)
def test_the_verdict_names_the_right_cause(shell: Shell, size: int, verdict: str) -> None:
    """No step was made, and it said that there was no text to validate on."""
    Path("short.txt").write_text("ab")
    _, out, _ = shell("train", ["fox.txt", "short.txt"][size], *TINY, "--steps", 3 * size)
    assert f"diagnosis: {verdict}\n" in out
    assert "nan" not in out
    if size:
        assert "too short to keep a part of it for validation: none is kept" in out
        assert "for validation (" not in out, "the line of its tokens says the same"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["generate", "hi", "you"], "give the text to continue with --prompt 'hi you'"),
        (["generate", "fox.txt"], "name a model with --checkpoint fox.txt"),
        (["gen"], "there is no command 'gen': did you mean generate?"),
        (["traim"], "did you mean train?"),
        (["fox.txt"], "to train on it, mygpt train fox.txt"),
        (["xyzzy"], "there is no command 'xyzzy': `mygpt --help` lists them"),
        (["info", "a", "b"], "unexpected argument 'b': `mygpt info --help` lists the options"),
        (["train", "https://host.example/a.txt"], "not network addresses"),
        (["eval", "runs", "http://host.example/a.txt"], ""),
        (["train", "fox.txt", "--minutes", 0], "minutes=0.0 must be above 0"),
        (["train", "fox.txt", "--minutes", -3], "minutes=-3.0 must be above 0"),
    ],
)
def test_a_wrong_command_names_the_way_on(shell: Shell, args: list[Any], said: str) -> None:
    assert said in shell.refused(*args)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.txt"], "missing.txt does not exist"),
        (["empty.txt"], "empty.txt is empty"),
        (["one.txt"], "one has 1 character"),
        (["latin.txt", "--tokenizer", "char"], "latin.txt is not utf-8: byte 0xe9 at position 3"),
        (["folder"], "folder folder contains no text file"),
        (["fox.txt", "--embed-dim", "65", "--num-heads", "4"], "choose 64 or 68"),
        (["fox.txt", "--steps", "-1"], "steps=-1 must be a whole number of at least 0"),
        (["fox.txt", "--lr", "nan"], "lr=nan must be"),
        (["fox.txt", "--steps", "many"], "--steps"),
        (["fox.txt", "--stepz", "1"], "there is no option --stepz: did you mean --steps?"),
        (["fox.txt", "--device", "cuda"], "device='cuda' is not available here"),
        (["fox.txt", "--preset", "gigantic"], "choose auto, tutorial, nano, small, medium, large"),
        (["fox.txt", "--output", "fox.txt/run"], "fox.txt"),
    ],
)
def test_train_refuses_in_one_line_and_writes_nothing(
    shell: Shell, tmp_path: Path, args: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "one.txt").write_bytes(b"x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = shell("train", *args)
    assert code in (2, 3)
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_train_into_a_run_is_refused(shell: Shell) -> None:
    shell("train", "fox.txt", *TINY, "--steps", 1)
    assert "--resume runs/fox" in shell.refused("train", "fox.txt", *TINY, "--steps", 1)
    shell.printed("train", "fox.txt", *TINY, "--steps", 1, "--overwrite")


def test_train_without_space_ends_with_code_3(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = shell("train", "fox.txt", *TINY, "--steps", 1)
    assert code == 3
    assert "No space left on device" in err


def test_train_without_memory_ends_with_code_4(shell: Shell) -> None:
    args = ["--embed-dim", 2**20, "--num-layers", 1, "--num-heads", 1, "--steps", 1]
    code, _, err = shell("train", "fox.txt", "--preset", "tutorial", *args)
    assert (code, err.count("\n")) == (4, 1)
    assert "parameters needs about" in err
    assert not Path("runs").exists()


@pytest.mark.processes
def test_ctrl_c_saves_prints_how_to_resume_and_ends_with_130(tmp_path: Path) -> None:
    command = [*COMMAND, "train", "fox.txt", *TINY, "--steps", "1000000", "--print-every", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step   20"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    assert "resume with: mygpt train --resume runs/fox\n" in out
    assert (tmp_path / "runs/fox/last.state.safetensors").exists()


@pytest.mark.processes
def test_training_outlives_whoever_reads_its_lines(tmp_path: Path) -> None:
    """`mygpt train file | head -1` must not lose the run."""
    command = [*COMMAND, "train", "fox.txt", *TINY, "--steps", "30", "--print-every", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.wait(timeout=60)
    assert '"step": 30' in (tmp_path / "runs/fox/log.jsonl").read_text()


# --- generate ------------------------------------------------------------------------------


def test_generate_prints_the_text_and_nothing_else(shell: Shell, run: Path) -> None:
    args = ["generate", "-c", run, "-p", "the ", "-n", 30, "--seed", 7]
    code, out, err = shell(*args)
    assert (code, err) == (0, "")
    assert out.startswith("the ")
    writer = mygpt.load(run)
    assert out == writer.generate("the ", 30, seed=7, temperature=0.8).rstrip("\n") + "\n"
    as_in_python = shell.printed(*args, "--temperature", 1)
    assert as_in_python == writer.generate("the ", 30, seed=7).rstrip("\n") + "\n"
    assert shell(*args, "--no-stream") == (0, out, "")
    assert shell("generate", "-c", run / "best.safetensors", *args[3:]) == (0, out, "")


def test_generate_shows_the_seed_it_drew(shell: Shell, run: Path) -> None:
    _, out, err = shell("generate", "-c", run, "-p", "the ", "-n", 30)
    seed = re.fullmatch(r"seed (\d+)\n", err)
    assert seed is not None
    assert shell("generate", "-c", run, "-p", "the ", "-n", 30, "--seed", seed[1]) == (0, out, "")


def test_generate_takes_the_newest_run(
    shell: Shell, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no run under runs/" in shell.refused("generate", "-p", "x", "--seed", 1)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(run)
    assert shell.printed("generate", "-p", "fox", "-n", 5, "--seed", 1).startswith("fox")


@pytest.mark.processes
def test_generate_prompt_from_stdin_and_file(shell: Shell, run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"the fox\n")
    args = ["-n", "10", "--greedy"]
    _, expected, _ = shell("generate", "-c", run, "--prompt-file", "prompt.txt", *args)
    assert expected.startswith("the fox\n")
    piped = subprocess.run(
        [*COMMAND, "generate", "-c", str(run), "-p", "-", *args],
        input=b"the fox\n",
        capture_output=True,
        check=True,
    )
    assert piped.stdout.decode() == expected


def test_generate_json_with_logprobs(shell: Shell, run: Path) -> None:
    out = shell.printed(
        *("generate", "-c", run, "-p", "the ", "-n", 5, "--seed", 3),
        *("--num-samples", 2, "--json", "--logprobs", 3),
    )
    samples = [json.loads(line) for line in out.splitlines()]
    assert [sample["index"] for sample in samples] == [0, 1]
    assert all(sample["seed"] == 3 and sample["prompt"] == "the " for sample in samples)
    for sample in samples:
        assert len(sample["logprobs"]) == len(sample["token_ids"]) == 5
        for entry in sample["logprobs"]:
            values = [logprob for _, logprob in entry["top"]]
            assert values == sorted(values, reverse=True)
            assert len(values) == 3
            assert entry["logprob"] <= values[0]


def test_generate_stops_before_a_stop_text(shell: Shell, run: Path) -> None:
    args = ["generate", "-c", run, "-p", "the quick", "-n", 60, "--greedy"]
    _, full, _ = shell(*args)
    _, cut, _ = shell(*args, "--stop", "fox", "--stop", "nowhere")
    assert "fox" in full, "the model has memorized its one sentence"
    assert cut == full[: full.index("fox")] + "\n"
    _, line, _ = shell(*args, "--stop", r"\n")
    assert line == full[: full.index("\n")] + "\n"


def test_generate_says_when_a_prompt_is_longer_than_the_window(shell: Shell, run: Path) -> None:
    long = ["generate", "-c", run, "-p", "the quick brown fox jumps", "-n", 3, "--seed", 1]
    code, _, err = shell(*long)
    assert code == 0
    assert err == "the prompt has 25 tokens: the model reads the last 16\n"
    assert "the window 16" in shell.refused(*long, "--overflow", "stop")


def test_an_empty_prompt_starts_from_nothing(shell: Shell, run: Path) -> None:
    assert len(shell.printed("generate", "-c", run, "-p", "", "-n", 20, "--seed", 1)) > 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "Ω and ß"], "'ß' 'Ω'"),
        (["--temperature", "-1"], "temperature=-1.0 must be"),
        (["--temperature", "nan"], "temperature=nan must be"),
        (["--top-k", "-1"], "top_k=-1 must be"),
        (["--top-p", "0"], "top_p=0.0 must be above 0 and at most 1"),
        (["--top-p", "1.5"], "top_p=1.5 must be"),
        (["--min-p", "2"], "min_p=2.0 must be"),
        (["--repetition-penalty", "0"], "repetition_penalty=0.0 must be"),
        (["--max-new-tokens", "-1"], "max_new_tokens=-1 must be"),
        (["--num-samples", "0"], "num_samples=0 must be"),
        (["--seed", "-1"], "seed=-1 must be"),
        (["--stop", ""], "stop"),
        (["--overflow", "wrap"], "choose crop, refill, stop"),
        (["--device", "cuda"], "device='cuda' is not available here"),
        (["--dtype", "int3"], "dtype='int3' is not known"),
        (["--greedy", "--temperature", "1"], "exclude each other"),
        (["--logprobs", "2"], "add --json"),
        (["--json", "--logprobs", "-1"], "logprobs=-1 must be"),
        (["--prompt-file", "nowhere"], "nowhere does not exist: name a text file"),
        (["-c", "nowhere"], "nowhere does not exist"),
        (["-c", "."], "has no best.safetensors"),
    ],
)
def test_generate_refuses_in_one_line(
    shell: Shell, run: Path, args: list[str], message: str
) -> None:
    prompt = [] if "-p" in args or "--prompt-file" in args else ["-p", "the"]
    checkpoint = [] if "-c" in args else ["-c", str(run)]
    seed = [] if "--seed" in args else ["--seed", "1"]
    assert message in shell.refused("generate", *checkpoint, *prompt, *seed, *args)


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_damaged_and_foreign_checkpoints_are_refused(shell: Shell, run: Path) -> None:
    data = (run / "best.safetensors").read_bytes()
    flipped = bytearray(data)
    flipped[-9] ^= 1
    newer = data.replace(b'"format_version":"1"', b'"format_version":"9"')
    files = {
        "cut.safetensors": (data[:-10], "it is truncated or extended"),
        "flipped.safetensors": (bytes(flipped), "does not match its digest"),
        "bomb.pt": (pickle.dumps(Bomb()), "a pickle: import it first"),
        "newer.safetensors": (newer, "header does not match its digest"),
        "text.txt": (b"Call me Ishmael. Some years ago", "not a mygpt checkpoint"),
        "empty.pt": (b"", "it is truncated"),
    }
    for name, (content, message) in files.items():
        Path(name).write_bytes(content)
        for command in (["generate", "-p", "x", "--seed", "1", "-c", name], ["info", name]):
            err = shell.refused(*command)
            assert name in err
            assert message in err
    assert not Path("executed").exists()


@pytest.mark.processes
def test_a_reader_that_leaves_ends_generation_quietly(run: Path) -> None:
    command = [*COMMAND, "generate", "-c", str(run), "-p", "the ", "-n", "100000", "--seed", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(50)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) in (-signal.SIGPIPE, 128 + signal.SIGPIPE)


# --- info, data, demo, help ----------------------------------------------------------------


def test_info_shows_the_contents(shell: Shell, run: Path) -> None:
    out = shell.printed("info", run)
    for part in ("parameters:", "16 tokens", "char, vocabulary 30", "400 steps", "digests match"):
        assert part in out
    assert re.search(r"^command: +mygpt train fox.txt$", out, re.M)
    values = json.loads(shell.printed("info", run, "--json"))
    assert values["config"]["embed_dim"] == 16
    assert values["provenance"]["corpus"]["name"] == "fox"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server on this machine, and the folder it serves."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


@pytest.mark.processes
def test_data_fetches_checks_and_writes_only_the_right_bytes(
    shell: Shell, web: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mygpt.cli.data as data

    url, folder = web
    play = b"First Citizen:\n" * 100
    monkeypatch.setattr(data, "_SHA256", hashlib.sha256(play).hexdigest())
    (folder / "play").write_bytes(play)
    (folder / "other").write_bytes(play + b"!")
    err = shell.refused("data", "shakespeare", "--url", f"{url}/other")
    assert "nothing was written" in err
    assert "404" in shell.refused("data", "shakespeare", "--url", f"{url}/nowhere")
    assert "must begin with https://" in shell.refused("data", "shakespeare", "--url", "gopher://x")
    assert "cannot fetch" in shell.refused("data", "shakespeare", "--url", "http://127.0.0.1:9/")
    assert not Path("tinyshakespeare.txt").exists()
    shell.printed("data", "shakespeare", "--url", f"{url}/play")
    assert Path("tinyshakespeare.txt").read_bytes() == play
    assert "exists already" in shell("data", "shakespeare", "--url", f"{url}/nowhere")[1]
    Path("mine.txt").write_text("mine")
    assert "another file" in shell.refused("data", "shakespeare", "-o", "mine.txt")


@pytest.mark.kernels
def test_demo_trains_and_writes_at_three_temperatures(shell: Shell) -> None:
    for _ in range(2):  # an earlier demo may be replaced
        code, out, err = shell("demo", "--minutes", 0.02)
        assert (code, err) == (0, "")
        assert out.count("--- temperature ") == 3
        assert "unigram" in out
    shell("train", "fox.txt", *TINY, "--steps", 1, "--output", "runs/mine")
    assert "already holds a run" in shell.refused("demo", "--minutes", 0.02, "-o", "runs/mine")


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from mygpt.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


COMMANDS = (
    "train", "generate", "play", "explain", "eval", "report", "compare", "reproduce", "import",
    "export", "serve", "info", "plan", "demo", "warmup", "doctor", "tokenize",
)  # fmt: skip


@pytest.mark.parametrize("command", [*COMMANDS, "data shakespeare"])
def test_every_command_has_an_example(shell: Shell, command: str) -> None:
    assert "Example: mygpt" in shell.printed(*command.split(), "--help")


def test_every_command_and_the_version_can_be_reached_from_the_app(shell: Shell) -> None:
    assert {command.name for command in app.registered_commands} == {*COMMANDS}
    assert shell.printed("--version") == f"mygpt {mygpt.__version__}\n"
