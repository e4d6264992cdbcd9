"""What `esfast.grpo` and TRL's GRPOTrainer say to each other.

TRL holds the optimiser, the loss and the loop; `GrpoRun` answers for completions (through TRL's
`rollout_func`, with the engine's own tokens of prompt and answer) and rewards, and is told of every
generation. A row of the data set is the number of an example in the sequence of all generations, so
that the prompts are the task's, in order, whatever TRL does with rows.

What is set here beside the user's flags, and what is left as TRL has it, is SETTINGS; it goes to
config.json. Tested with trl 1.16.0 and, the last for Python 3.10, 1.14.2; their `rollout_func` is
called experimental.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

from esfast.errors import ConfigError, DataError, EsfastError, first_line
from esfast.models import without_bars
from esfast.whole_file import write_whole

if TYPE_CHECKING:
    from esfast.grpo import GrpoConfig, GrpoRun

WHOLE = "esfast.json"
"""Written into a checkpoint once all of it is on the disk."""
KEPT = 2
"""The newest may be half written when a run is killed."""
SETTINGS: Mapping[str, Any] = {
    "optimizer": "AdamW, betas (0.9, 0.999), eps 1e-8, no weight decay",
    "learning_rate_schedule": "constant, no warm-up (TRL's default falls linearly to 0)",
    "gradient_clipping": "norm 1.0 (TRL's default)",
    "loss": "dapo: token mean over the generation's completions (TRL's default)",
    "advantage": "(reward - group mean) / (group deviation + 1e-4) (TRL's default)",
    "kl": "k3 estimate times the ratio to the old policy, in loss and kl_to_start (TRL's default)",
    "completions": "temperature as given, top_p 1, no top_k; cut ones are trained on as well",
    "adapters": "none: every weight is trained",
}
TORCH_WRITER = "inline_container.cc"  # in torch.save's error where a disk is full
NUMBERS = {
    "loss": "loss",
    "grad_norm": "gradient_norm",
    "entropy": "entropy",
    "kl": "kl_to_start",
    "frac_reward_zero_std": "groups_without_signal",
    "clip_ratio/region_mean": "clipped_share",
}
"""TRL's names of the numbers that go to metrics.jsonl, and theirs there."""


def require_trl() -> None:
    """Raises ConfigError where trl is not installed or older than what this was written for."""
    try:
        from trl.trainer.grpo_config import GRPOConfig
    except ImportError as error:
        raise ConfigError(
            f"esfast grpo needs the trl package ({error}); pip install 'esfast[forgetting]', or "
            "pip install 'trl>=1.14'."
        ) from None
    if "generation_batch_size" not in GRPOConfig.__dataclass_fields__:
        raise ConfigError("the trl that is installed is too old; pip install 'trl>=1.14'.")


def make_trainer(run: GrpoRun, folder: Path) -> Any:
    """TRL's trainer of `run`'s model; checkpoints go to `folder`."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    config, engine = run.config, run.engine
    rows = Dataset.from_dict(
        {"prompt": [str(n) for n in range(config.generations * config.prompts)]}
    )
    engine.model.requires_grad_(True)
    trainer: Any = GRPOTrainer(
        model=engine.model,
        reward_funcs=[_reward_of(run)],
        args=arguments(config, folder, engine.model),
        train_dataset=rows,
        processing_class=engine.tokenizer,
        callbacks=[_watch(run)],
        rollout_func=_rollout_of(run),
    )
    with suppress(OSError):  # TRL makes it at once; a run may never write a checkpoint
        folder.rmdir()
    trainer.remove_callback(PrinterCallback)
    # With every checkpoint TRL writes a card of the model, for which it looks for other packages.
    trainer.create_model_card = lambda **_: None
    trainer._save_checkpoint = _said(trainer._save_checkpoint, folder)
    if trainer.ref_model is not None:  # TRL read it from the folder again, in whatever dtype
        trainer.ref_model.load_state_dict(engine.model.state_dict())
    return trainer


def _said(save: Callable[..., object], folder: Path) -> Callable[..., None]:
    """`save`, with an EsfastError where the disk fails: safetensors and torch raise their own."""

    def checkpoint(*arguments: Any, **settings: Any) -> None:
        try:
            save(*arguments, **settings)
        except (OSError, SafetensorError, RuntimeError) as error:
            if type(error) is RuntimeError and TORCH_WRITER not in str(error):
                raise
            raise EsfastError(
                f"no checkpoint could be written to {folder}: {first_line(error)}. Those before "
                "are whole; free some space and go on with --resume."
            ) from None

    return checkpoint


def arguments(config: GrpoConfig, folder: Path, model: Any) -> Any:
    """TRL's configuration; see SETTINGS."""
    from trl.trainer.grpo_config import GRPOConfig

    every = config.checkpoint_every * config.iterations
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=model.device.type == "cpu",
        bf16=config.mixed(model),
        seed=config.seed & 0xFFFFFFFF,
        max_steps=config.generations * config.iterations,
        per_device_train_batch_size=config.rows,
        gradient_accumulation_steps=config.completions // config.rows,
        num_generations=config.group_size,
        num_iterations=config.iterations,
        max_completion_length=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        beta=config.beta,
        epsilon=config.epsilon,
        use_bias_correction_kl=True,
        gradient_checkpointing=config.gradient_checkpointing,
        shuffle_dataset=False,
        logging_steps=config.iterations,
        logging_nan_inf_filter=False,
        save_strategy="steps" if every else "no",
        save_steps=every or 500,
        save_total_limit=KEPT,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def newest_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """(generation, path) of the newest whole checkpoint, None where none ever was. Raises DataError
    where all are damaged."""
    marks = list(folder.glob(f"checkpoint-*/{WHOLE}"))
    found = [(_generation_of(mark), mark.parent) for mark in marks if _is_readable(mark.parent)]
    if marks and not found:
        raise DataError(
            f"{folder} holds no whole checkpoint to go on from: files have lost their end. Start a "
            "new run."
        )
    return max(found, default=None)


def _is_readable(checkpoint: Path) -> bool:
    """Whether its files end where they should; a disk may have lost the end of one since."""
    try:
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, SafetensorError):
        return False
    return all(is_zipfile(path) for path in checkpoint.glob("*.pt"))


def _generation_of(mark: Path) -> int:
    try:
        return int(json.loads(mark.read_text(encoding="utf-8"))["generation"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{mark} is damaged ({error}); remove its folder.") from None


def _place(run: GrpoRun, rows: Sequence[str]) -> tuple[int, list[int]]:
    """The generation that the rows belong to, and their places in it."""
    numbers = [divmod(int(row), run.config.prompts) for row in rows]
    return numbers[0][0], [place for _, place in numbers]


def _rollout_of(run: GrpoRun) -> Any:
    def complete(rows: list[str], trainer: Any) -> dict[str, Any]:
        generation, places = _place(run, rows)
        completions = run.answer(generation, places)
        return {
            "prompt_ids": run.engine.token_ids(run.prompts(generation, places)),
            "completion_ids": [list(completion.ids) for completion in completions],
            "logprobs": None,
            "text": [completion.text for completion in completions],
        }

    return complete


def _reward_of(run: GrpoRun) -> Any:
    def task_score(prompts: list[str], text: list[str], **_: Any) -> list[float]:
        return run.reward(*_place(run, prompts), text)

    return task_score


def _watch(run: GrpoRun) -> Any:
    """A callback that tells `run` of each generation and marks whole checkpoints."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "reward" in logs:
                numbers = {name: logs[key] for key, name in NUMBERS.items() if key in logs}
                run.stepped(state.global_step // run.config.iterations, numbers)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            mark = Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE
            write_whole(mark, json.dumps({"generation": run.generation}).encode())

    return Watch()


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' progress bars and warnings, such as TRL's that `rollout_func` is
    experimental, and without TRL's report of every run to the hub."""
    from huggingface_hub import constants

    told = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with warnings.catch_warnings(), without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = told
