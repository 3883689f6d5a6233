"""lm-evaluation-harness: an exported folder compared with mygpt's evaluation and server."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.decode.writer import Writer
from mygpt.evaluation.losses import evaluate
from mygpt.text.documents import TextSize

_CONTEXT, _GREEDY = 12, 6  # characters of a context; tokens that are generated after it
_TASK = """\
task: passages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{first}}}}"
doc_to_target: "{{{{rest}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""


def judge_by_harness(
    found: Checkpoint, folder: Path, texts: list[str], work: Path
) -> dict[str, Any] | None:
    """Loglikelihoods of texts after their first character, by both; None without lm-eval.

    Args:
        found: the model, whose tokens are characters or bytes.
        folder: the exported model.
        texts: each fits the window.
        work: a folder for the task's files.
    """
    if find_spec("lm_eval") is None:
        return None
    texts = [text.strip() for text in texts]  # the harness moves spaces from a context's end
    task = _Task([(text[0], text[1:]) for text in texts], work / "whole")
    theirs = [logprob for logprob, _ in task.ask("hf", f"pretrained={folder},dtype=float32")]
    model, tokenizer = found.build_model().eval(), found.tokenizer
    ours = []
    for text in texts:
        ids = tokenizer.encode_array(text)
        result = evaluate(model, ids, found.config.max_seq_len, TextSize(1, 1))
        ours.append(-result.loss * result.tokens)
    return {
        "program": f"lm-evaluation-harness {version('lm_eval')}",
        "texts": len(texts),
        "theirs": sum(theirs),
        "ours": sum(ours),
        "furthest": float(np.abs(np.array(theirs) - np.array(ours)).max()),
    }


def judge_server(
    found: Checkpoint, folder: Path, texts: list[str], work: Path
) -> dict[str, Any] | None:
    """Results of the harness for `mygpt serve` and for an exported folder; None without lm-eval.

    Requested are, after the first characters of each text, the rest of the text and the model's
    greedy continuation, for which the flag "is greedy" is true.

    Args:
        found: the model, whose tokens are characters or bytes.
        folder: the exported model.
        texts: each fits the window.
        work: a folder for the task's files.
    """
    if find_spec("lm_eval") is None:
        return None
    texts = [text.strip() for text in texts]
    writer = Writer(found, found.tokenizer)
    pairs = [(text[:_CONTEXT].strip(), text[len(text[:_CONTEXT].strip()) :]) for text in texts]
    for first, _ in list(pairs):
        written = writer.complete(first, _GREEDY, temperature=0)[0].text
        if written.strip():
            pairs.append((first, written.rstrip()))
    task = _Task(pairs, work / "parts")
    theirs = task.ask("hf", f"pretrained={folder},dtype=float32")
    with _served(found) as (url, name):
        ours = task.ask(
            "local-completions",
            f"model={name},base_url={url}/v1/completions,tokenizer={folder},"
            "tokenizer_backend=huggingface,num_concurrent=1,max_retries=1",
        )
    logprobs = np.array([[logprob for logprob, _ in row] for row in (theirs, ours)])
    return {
        "program": f"lm-evaluation-harness {version('lm_eval')}",
        "pairs": len(pairs),
        "furthest": float(np.abs(logprobs[0] - logprobs[1]).max()),
        "greedy": sum(greedy for _, greedy in theirs),
        "flags_alike": sum(a[1] == b[1] for a, b in zip(theirs, ours, strict=True)),
    }


class _Task:
    """A task of the harness: the loglikelihood of a text after another one.

    Args:
        pairs: contexts and continuations.
        work: a folder that is created for its files.
    """

    def __init__(self, pairs: list[tuple[str, str]], work: Path) -> None:
        self.tasks, file = work / "tasks", work / "passages.jsonl"
        self.tasks.mkdir(parents=True)
        rows = [json.dumps({"first": first, "rest": rest}) for first, rest in pairs]
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")
        (self.tasks / "passages.yaml").write_text(_TASK.format(file=file), encoding="utf-8")

    def ask(self, model: str, arguments: str) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        results: Any = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=["passages"],
            task_manager=TaskManager(include_path=str(self.tasks), include_defaults=False),
            device="cpu",
            batch_size=1,
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"]["passages"], key=lambda sample: sample["doc_id"])
        # The unfiltered response of the model: filters may drop the flag.
        answers = [sample["resps"][0][0] for sample in samples]
        return [(float(logprob), str(greedy) == "True") for logprob, greedy in answers]


@contextlib.contextmanager
def _served(found: Checkpoint) -> Iterator[tuple[str, str]]:
    """Start a server for a model; its address, and the model's name there."""
    command = [sys.executable, "-m", "mygpt", "serve", str(found.path), "--port", "0", "--quiet"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        found_url = re.search(r"http://[\w.:]+", server.stderr.readline())
        assert found_url is not None, "the server did not start"
        with urllib.request.urlopen(f"{found_url[0]}/v1/models") as answer:
            yield found_url[0], json.load(answer)["data"][0]["id"]
    finally:
        server.terminate()
        server.wait()
