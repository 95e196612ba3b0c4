"""What a model can do besides refusing: benchmarks of lm-evaluation-harness on the live model, intact or pruned.

The harness is the extra ``eval``. Its own tasks come from the Hub; those in ``tasks/`` ask the same questions from
files in a folder, so that they run without a network.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safeneuron.data.rows import Source, read_rows, value_at
from safeneuron.errors import InputError, did_you_mean
from safeneuron.models.model import Model
from safeneuron.runtime.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset


class Task(NamedTuple):
    """A benchmark: solved examples before a question, the metric that is its score, and where its questions are.

    ``file`` is its name in a folder, ``home`` the harness' own folder of the task, which reads them from the Hub.
    """

    shots: int
    metric: str
    file: str
    home: str


TASKS = {
    "arc_challenge": Task(25, "acc_norm,none", "arc_challenge.jsonl", "arc"),
    "gsm8k": Task(5, "exact_match,strict-match", "gsm8k_test.jsonl", "gsm8k"),
    "truthfulqa_mc1": Task(0, "acc,none", "TruthfulQA.csv", "truthfulqa"),
    "truthfulqa_mc2": Task(0, "acc,none", "TruthfulQA.csv", "truthfulqa"),
}
"""The benchmarks by the name that the harness has for them."""

INSTALL = "install it with: pip install 'safeneuron[eval]'"
LOCAL_TASKS = Path(__file__).with_name("tasks")
FEWSHOT_SEED = 1234
"""The harness' own seed for the choice of examples, so that numbers are those of its command line."""


@dataclass(frozen=True)
class BenchmarkScore:
    """A model's score on one benchmark: the share ``value`` with its standard error over ``n`` questions.

    ``metrics`` holds all that the harness reports, as ``(value, standard error)``; ``source`` is "files" or "Hub".
    """

    task: str
    source: str
    shots: int
    n: int
    metric: str
    value: float
    stderr: float
    metrics: dict[str, tuple[float, float]]

    def to_record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def require_benchmarks(tasks: Sequence[str], folder: str = "") -> None:
    """Raise ``InputError``, before hours of work, if the harness or a file of one of the tasks is missing.

    Args:
        tasks: Names of ``TASKS``.
        folder: Where their files are; empty for the Hub.

    Raises:
        InputError: With what is missing and how to get it.
    """
    if find_spec("lm_eval") is None:
        raise InputError(f"capability benchmarks need lm-evaluation-harness, which is not installed; {INSTALL}")
    for task in tasks:
        file = Path(folder).expanduser() / TASKS[task].file
        if folder and not file.is_file():
            raise InputError(
                f"{task} asks the questions in {file}, which does not exist; put the file there, leave the task out of "
                "capability.tasks, or leave capability.folder empty to read from the Hub"
            )


def benchmark(
    model: Model,
    task: str,
    folder: str = "",
    limit: int | None = None,
    shots: int | None = None,
    chat_template: bool = False,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> BenchmarkScore:
    """The score of the model as it stands, so within ``with pruned(...)`` that of the pruned model.

    One process does it alone.

    Args:
        model: The model.
        task: One of ``TASKS``.
        folder: Where the questions' files are; empty for the Hub.
        limit: Keeps the first so many questions.
        shots: Solved examples before a question, in place of the task's own number; TruthfulQA keeps 0.
        chat_template: Whether questions and examples go through the model's chat template.
        batch_size: Questions, each with one answer, in one forward pass.
        progress: Is called with how many answers are scored or written, and of how many.

    Returns:
        The score with its standard error.

    Raises:
        InputError: If the harness is missing, the task is unknown, or its questions cannot be read or are too few.
    """
    if task not in TASKS:
        raise InputError(
            f"there is no capability benchmark {task!r}{did_you_mean(task, TASKS)}; known are {', '.join(TASKS)}"
        )
    if limit is not None and limit < 2:
        raise InputError(f"a standard error needs at least 2 questions, found limit = {limit}; give more, or no limit")
    evaluator, harness = _harness()
    loaded = _loaded(task, folder, shots)
    questions, examples = len(loaded.eval_docs), int(loaded.get_config("num_fewshot"))
    if questions < max(2, examples + 1):
        raise InputError(
            f"{task} has {questions} questions in {folder or 'its data set'}, too few for {examples} examples and a "
            "standard error; give more questions or fewer shots"
        )
    training = model.network.training
    try:
        results = evaluator.evaluate(
            _told(harness, model, batch_size, progress),
            {"tasks": {task: loaded}, "groups": {}},
            limit=limit,
            log_samples=False,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    finally:
        model.network.train(training)
    return _score(task, "files" if folder else "Hub", examples, results)


def _harness() -> tuple[Any, Any]:
    """The harness' evaluator and its class for models of transformers."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(
            f"capability benchmarks need lm-evaluation-harness, which cannot be loaded ({error}); {INSTALL}"
        ) from error
    return evaluator, HFLM


def _loaded(task: str, folder: str, shots: int | None) -> Any:
    """The harness' task with its questions read and its number of examples set."""
    from datasets.exceptions import DatasetsError
    from lm_eval import tasks

    # To look through all tasks of the harness would take half a minute.
    home = LOCAL_TASKS if folder else Path(str(tasks.__file__)).with_name(TASKS[task].home)
    place = {"folder": folder, "file": TASKS[task].file} if folder else {}
    manager = tasks.TaskManager(include_path=str(home), include_defaults=False, metadata=place)
    try:
        loaded = manager.load([task])["tasks"][task]
    # What datasets raises: its own errors, OSError (offline, missing, HTTP), ValueError and RuntimeError; the harness:
    # ImportError, for a package that one of its tasks needs.
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(
            f"the questions of {task} cannot be loaded from the Hub ({reason}); connect to it, or name a folder of "
            "files with capability.folder"
        ) from error
    own = loaded.get_config("num_fewshot")
    loaded.set_config(key="num_fewshot", value=0 if own == 0 else TASKS[task].shots if shots is None else shots)
    loaded.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _told(harness: Any, model: Model, batch_size: int, progress: Progress | None) -> Any:
    """The model as the harness sees it, without bars of its own; each answer is told to ``progress``.

    The harness hands every answer to a hook, which is there for its cache. Log-probabilities are taken in float32,
    since in bfloat16 many answers would be equally likely.
    """

    class Told(harness):  # type: ignore[misc]
        done = total = 0

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            self.total += len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
            self.total += len(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            self.done += 1
            if progress is not None:
                progress(self.done, self.total)

    told = Told(
        pretrained=model.network,
        tokenizer=model.tokenizer,
        batch_size=batch_size,
        softmax_dtype="float32",
        backend="causal",
    )
    told.set_cache_hook(told)
    # Of a model whose weights are elsewhere until they are needed, it takes that for the place of its inputs.
    told._device = model.device
    return told


def _score(task: str, source: str, shots: int, results: Mapping[str, Any]) -> BenchmarkScore:
    found = results["results"][task]
    metrics = {}
    for name, value in found.items():
        metric, comma, kind = name.partition(",")
        stderr = found.get(f"{metric}_stderr,{kind}")
        if comma and isinstance(value, int | float) and isinstance(stderr, int | float):
            metrics[name] = (float(value), float(stderr))
    main = TASKS[task].metric
    n = int(results["n-samples"][task]["effective"])
    return BenchmarkScore(task, source, shots, n, main, *metrics[main], metrics)


# -- named in the files of tasks/ -------------------------------------------------------------------------------------


def read_questions(folder: str, file: str, columns: Sequence[str], **other: object) -> dict[str, Dataset]:
    """The rows of a task's file as its test split; ``other`` is what else the harness knows of a task.

    Raises ``InputError`` for a file that is missing or lacks one of the columns.
    """
    from datasets import Dataset

    rows = read_rows(Source(str(Path(folder).expanduser() / file)))
    return {"test": Dataset.from_list([{name: value_at(row, name) for name in columns} for row in rows])}


def best_among_incorrect(questions: Dataset) -> Dataset:
    """TruthfulQA's MC1: the best answer first, then the incorrect ones."""

    def choices(row: Mapping[str, str]) -> dict[str, Any]:
        return {
            "question": row["Question"].strip(),
            "choices": [row["Best Answer"].strip(), *_answers(row, "Incorrect")],
        }

    return questions.map(choices)


def correct_among_all(questions: Dataset) -> Dataset:
    """TruthfulQA's MC2: all correct answers, then the incorrect ones; ``labels`` says which is which."""

    def choices(row: Mapping[str, str]) -> dict[str, Any]:
        correct, incorrect = _answers(row, "Correct"), _answers(row, "Incorrect")
        labels = [1] * len(correct) + [0] * len(incorrect)
        return {"question": row["Question"].strip(), "choices": [*correct, *incorrect], "labels": labels}

    return questions.map(choices)


def share_of_correct(question: Mapping[str, Any], answers: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """MC2: the probability of the correct answers among all, from the log-probability of each."""
    import numpy as np

    logs = np.array([log for log, _ in answers])
    # Long answers have tiny probabilities; only their ratios matter.
    shares = np.exp(logs - logs.max())
    return {"acc": float(shares[np.array(question["labels"]) == 1].sum() / shares.sum())}


def _answers(row: Mapping[str, str], kind: str) -> list[str]:
    return [answer.strip() for answer in row[f"{kind} Answers"].split(";") if answer.strip()]
