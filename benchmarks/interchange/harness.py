"""lm-evaluation-harness on an exported folder beside our own evaluation."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mygpt.checkpoint import Checkpoint
from mygpt.evaluation import evaluate

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
    """Loglikelihoods of texts after their first character, theirs and ours; None without lm-eval.

    Args:
        found: the model, whose tokens are characters or bytes.
        folder: the same, exported.
        texts: of one window at most.
        work: a folder for the task's files.
    """
    if find_spec("lm_eval") is None:
        return None
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    texts = [text.strip() for text in texts]  # the harness moves spaces at a context's end
    tasks, file = work / "tasks", work / "passages.jsonl"
    tasks.mkdir()
    rows = [json.dumps({"first": text[0], "rest": text[1:]}) for text in texts]
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    (tasks / "passages.yaml").write_text(_TASK.format(file=file), encoding="utf-8")
    results: Any = simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},dtype=float32",
        tasks=["passages"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["passages"], key=lambda sample: sample["doc_id"])
    theirs = [float(sample["filtered_resps"][0][0]) for sample in samples]
    model, tokenizer = found.build_model().eval(), found.tokenizer
    ours = []
    for text in texts:
        ids = tokenizer.encode_array(text)
        result = evaluate(model, ids, found.config.max_seq_len, tokenizer.byte_lengths())
        ours.append(-result.loss * result.tokens)
    return {
        "program": f"lm-evaluation-harness {version('lm_eval')}",
        "texts": len(texts),
        "theirs": sum(theirs),
        "ours": sum(ours),
        "furthest": float(np.abs(np.array(theirs) - np.array(ours)).max()),
    }
