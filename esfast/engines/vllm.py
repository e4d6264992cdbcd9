"""VLLMEngine: text from vLLM, whose workers hold the weights and edit them in place.

Prompts are tokenised here as `TransformersEngine` does, so that both give the model the same tokens
and end answers at the same ones. vLLM runs in this process or in its own (as
VLLM_ENABLE_V1_MULTIPROCESSING says), on one device or several (`tensor_parallel_size`). Its prefix
cache is emptied at every call of `generate`: within a call, prompts share what they begin with;
from one member to the next nothing is kept.

When the engine starts, an edit of every kind of weight is tried, and what does not reach the
answers is refused by name (`esfast.engines.vllm_reach`). Not promised: the tokens of another
engine, whose sums are taken in another order; and sampled tokens are drawn by vLLM's own generator.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch

from esfast import measure
from esfast.checkpoint import ORIGIN, new_folder, require_replaceable
from esfast.engines import prompts as prompting
from esfast.engines.base import Completion, Prompt, Sampling
from esfast.engines.decoding import Ends
from esfast.engines.vllm_derived import REFUSE_LATER
from esfast.engines.vllm_options import require_options, require_plain
from esfast.engines.vllm_processes import Processes, engine_processes
from esfast.engines.vllm_reach import require_reach
from esfast.engines.vllm_remote import RemoteWeights
from esfast.engines.vllm_replies import answered
from esfast.errors import ConfigError, EsfastError, StateError, first_line
from esfast.home_folders import at_home
from esfast.interrupts import not_swallowed
from esfast.members import member_seed
from esfast.models import model_folder, read_tokenizer
from esfast.resources import available_memory

WORKER = "esfast.engines.vllm_worker.WorkerExtension"
CACHE_SHARE = 8  # of the free memory of a CPU, where nothing else is asked for
MOST_CACHE, LEAST_CACHE = 4 << 30, 1 << 28
TELL_MEMORY = frozenset(("gpu_memory_utilization", "kv_cache_memory_bytes"))  # of the options
PROBE_TOKENS, PROBE_NEW = 12, 2
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model's folder, beside its weights


@dataclass(frozen=True)
class _Rows:
    """Token ids of each prompt, as vLLM takes them."""

    prompts: tuple[dict[str, Any], ...]
    lengths: tuple[int, ...]


_OPEN: WeakSet[VLLMEngine] = WeakSet()


class VLLMEngine:
    """Greedy and sampled generation by vLLM; see `esfast.engines.base.Engine` for the contract.

    model: a folder, or a name as `esfast.models` knows it; dtype: of the weights, such as
    "bfloat16"; batch_size: the most prompts computed together, vLLM's own choice if None;
    system_prompt, chat: as of `TransformersEngine`; tensor_parallel_size: devices; threads: a
    worker on a CPU, all cores between them if None; options: further arguments of `vllm.LLM`, such
    as gpu_memory_utilization, the share of a device that it may take (on a CPU its cache gets an
    eighth of what is free where no option says otherwise).

    Raises ConfigError for a quantised model or another setting that cannot work, ParameterError for
    weights that cannot be edited or whose edits do not reach the answers, EsfastError where vLLM
    does not start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "bfloat16",
        batch_size: int | None = None,
        system_prompt: str | None = None,
        chat: bool | None = None,
        tensor_parallel_size: int = 1,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = model_folder(model)
        self._closed = True
        require_options(options or {}, batch_size)
        require_plain(self.folder, options or {})
        _prepare(tensor_parallel_size, threads)
        self.tokenizer = read_tokenizer(self.folder)
        self.system_prompt = system_prompt
        self._chat = prompting.uses_chat(self.tokenizer, chat)
        self._ends = ends_of(self.folder, self.tokenizer)
        self._plans: OrderedDict[Hashable, _Rows] = OrderedDict()
        self._weights: RemoteWeights | None = None
        given = {
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            **({} if batch_size is None else {"max_num_seqs": batch_size}),
            **_memory(tensor_parallel_size, options or {}),
            **(options or {}),
        }
        others = engine_processes(os.getpid())
        self._llm: Any = _start(self.folder, given)
        self._processes = Processes(self._llm.llm_engine.engine_core, others)
        self._closed = False
        _OPEN.add(self)
        self._try_weights()

    def live_weights(
        self, memory: str = "lean", anchor: Path | bool = False, threads: int | None = None
    ) -> RemoteWeights:
        """The weights in the workers; threads: a worker, its share of the cores if None."""
        self._require_open()
        self._weights = RemoteWeights(self._call, memory, anchor, threads)
        return self._weights

    def weights_changed(self) -> None:
        """Nothing to do: an edit makes again what was derived, and `generate` empties the prefix
        cache before it starts."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One completion a prompt, in order. Raises ConfigError, DataError or StateError before
        anything is generated."""
        self._require_open()
        if len(prompts) == 0:
            return []
        rows = self._rows(prompts)
        prompting.require_length(prompts, rows.lengths, sampling.max_new_tokens, self._context())
        outputs = self._run(
            rows.prompts, [self._parameters(sampling, at) for at in range(len(prompts))]
        )
        return [
            self._completion(output.outputs[0], sampling, read)
            for output, read in zip(outputs, rows.lengths, strict=True)
        ]

    def require_room(
        self, prompts: Sequence[Prompt], max_new_tokens: int, kind: str = "prompt"
    ) -> int | None:
        """As `esfast.engines.base.Bounded` says; the context is vLLM's max_model_len."""
        self._require_open()
        lengths = self._rows(prompts).lengths
        return prompting.require_length(prompts, lengths, max_new_tokens, self._context(), kind)

    def save(self, folder: str | Path, made: Mapping[str, Any] | None = None) -> Path:
        """The live weights with the configuration and tokenizer of the base, as `save_model` writes
        them: plain transformers loads the folder. Errors as of `esfast.checkpoint.save_model`."""
        target = at_home(folder).absolute()
        require_replaceable(target)
        weights = self._weights or self.live_weights()
        with new_folder(target) as fresh:
            weights.save(fresh / "model.safetensors")
            _copy_settings(self.folder, fresh, weights.specs()[0].dtype)
            if made is not None:
                (fresh / ORIGIN).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        return target

    def reset_peak(self) -> bool:
        """Forgets the peaks of memory so far, here and in the workers; False where it cannot."""
        return all([measure.reset_peak(), *self._call("reset_peak")])

    def peak_bytes(self) -> int:
        """This process's peak since then, and that of the workers' own processes."""
        peaks = {os.getpid(): measure.peak_bytes(), **dict(self._call("peak_bytes"))}
        return sum(peaks.values())

    def close(self) -> None:
        """Ends vLLM and its processes."""
        if self._closed:
            return
        self._closed = True
        self._plans.clear()
        _OPEN.discard(self)
        self._processes.close()
        with _groups_kept():
            self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def reach(self, all_of_them: bool = False) -> int:
        """Tries whether edits of every kind of weight (or of every group of weights) reach the
        answers; returns how many were tried. ParameterError, by name, where one does not."""
        names = self._call("group_names", all_of_them)[0]
        return require_reach(names, self._call, self._probe)

    def _try_weights(self) -> None:
        try:
            self.reach()
        except BaseException as error:
            self.close()
            theirs = type(error).__module__.startswith("vllm.") or isinstance(error, ValueError)
            if isinstance(error, EsfastError) or not theirs:
                raise
            raise EsfastError(  # vLLM's refusal of a prompt: an option that leaves it no answers
                f"vLLM starts with {self.folder.name} and refuses a prompt of {PROBE_TOKENS} "
                f"tokens whose answer and probabilities are looked at: {first_line(error)}. Look "
                "at the options (--engine-option)."
            ) from error

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        """What every worker's `Shard` answered to one call."""
        self._require_open()
        with self._processes.asked():
            replies = self._llm.collective_rpc("esfast", args=(name, *arguments))
        return answered(replies)

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("this engine is closed; make a new VLLMEngine.")

    def _rows(self, prompts: Sequence[Prompt]) -> _Rows:
        def make() -> _Rows:
            ids = prompting.tokenize(prompts, self.tokenizer, self.system_prompt, self._chat)
            texts = tuple({"prompt_token_ids": row} for row in ids)
            return _Rows(texts, tuple(len(row) for row in ids))

        return prompting.kept(self._plans, (self.system_prompt, prompting.key(prompts)), make)

    def _context(self) -> int:
        return int(self._llm.llm_engine.model_config.max_model_len)

    def _run(self, prompts: Sequence[Any], parameters: Any) -> list[Any]:
        """vLLM's outputs, with nothing kept of what was generated before. The workers know best
        whether bits were restored since: more than one handle may have edited them."""
        self._call("derive")
        with self._processes.asked():
            self._llm.reset_prefix_cache()
            outputs: list[Any] = self._llm.generate(list(prompts), parameters, use_tqdm=False)
        return outputs

    def _parameters(self, sampling: Sampling, at: int) -> Any:
        from vllm import SamplingParams

        drawn = {} if sampling.greedy else {"seed": member_seed(sampling.seed, at, 0) >> 1}
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            stop=list(sampling.stop) or None,
            stop_token_ids=sorted(self._ends.and_stops(self.tokenizer, sampling.stop).tokens),
            ignore_eos=True,  # the ends are ours, whatever vLLM reads from the folder
            detokenize=bool(sampling.stop),
            **drawn,
        )

    def _completion(self, output: Any, sampling: Sampling, read: int) -> Completion:
        ids = tuple(output.token_ids)
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        for stop in sampling.stop:
            text = text.split(stop, 1)[0]
        return Completion(text, len(ids), output.finish_reason == "stop", ids, read)

    def _probe(self) -> Any:
        """What the model says to a fixed prompt: its most probable tokens and their probabilities,
        at every place of the prompt and for the tokens after it."""
        from vllm import SamplingParams

        size = int(self._llm.llm_engine.model_config.get_vocab_size())
        ids = [(1 + 7919 * at) % size for at in range(PROBE_TOKENS)]
        wanted = SamplingParams(
            max_tokens=PROBE_NEW, temperature=0.0, logprobs=1, prompt_logprobs=1, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        output = self._run([{"prompt_token_ids": ids}], wanted)[0]
        places = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
        return [{token: one.logprob for token, one in place.items()} for place in places if place]


@contextmanager
def _groups_kept() -> Iterator[None]:
    """vLLM's groups of workers stay while another engine in this process needs them: its own
    ending of an engine takes them down."""
    from vllm.v1.engine import core

    takes_down = core.cleanup_dist_env_and_memory
    if _OPEN:
        core.cleanup_dist_env_and_memory = lambda *arguments, **options: None
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = takes_down


def ends_of(folder: Path, tokenizer: Any) -> Ends:
    """What ends an answer, as TransformersEngine finds it in a model of this folder."""
    from transformers import AutoConfig, GenerationConfig

    if (folder / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        configured = GenerationConfig.from_model_config(config)
    return Ends.of(SimpleNamespace(generation_config=configured), tokenizer)


def _memory(workers: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's own share of a GPU, or of a machine's memory that others use too a modest one."""
    from vllm.platforms import current_platform

    told = not TELL_MEMORY.isdisjoint(options) or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    room = available_memory()
    if told or room is None or not current_platform.is_cpu():
        return {}
    cache = max(LEAST_CACHE, min(room // CACHE_SHARE, MOST_CACHE)) // workers
    return {"kv_cache_memory_bytes": cache}


@not_swallowed()
def _start(folder: Path, given: Mapping[str, Any]) -> Any:
    from vllm import LLM

    set_threads = torch.set_num_threads  # a CPU worker in this process puts a mute in its place
    try:
        return LLM(
            model=str(folder),
            tokenizer=str(folder),
            trust_remote_code=False,
            enable_prefix_caching=True,
            worker_extension_cls=WORKER,
            additional_config={REFUSE_LATER: True},
            generation_config="vllm",
            use_tqdm_on_load=False,
            seed=0,
            **given,
        )
    except EsfastError:
        raise
    except Exception as error:  # whatever vLLM stumbles over
        reason = " ".join(str(error).split())  # some name the setting on their second line
        raise EsfastError(
            f"vLLM does not start with {folder.name}: {type(error).__name__}: "
            f"{reason[:400]} What it said before may say more "
            "(VLLM_LOGGING_LEVEL=INFO says all)."
        ) from error
    finally:
        torch.set_num_threads = set_threads


def require_device(name: str) -> str:
    """The kind of device that vLLM runs on. ConfigError for another one; "cpu" is the flag's
    default and says nothing."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return name  # the engine says so
    if name not in ("cpu", current_platform.device_type):
        raise ConfigError(
            f"--device {name} has no effect on vLLM, which runs on {current_platform.device_type} "
            "here: leave it out. Among several GPUs CUDA_VISIBLE_DEVICES chooses."
        )
    return str(current_platform.device_type)


def _prepare(workers: int, threads: int | None) -> None:
    """vLLM's settings of the environment, where the user has none. EsfastError without vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise EsfastError(
            f"the vLLM engine needs vLLM ({error}): pip install -c constraints-vllm.txt "
            "'.[train,vllm]' in an environment of its own, or use --engine transformers."
        ) from None
    if not current_platform.is_cpu():
        return
    # One worker runs in this process: no messages, and the memory that it takes is measured.
    os.environ.setdefault(IN_PROCESS, "0" if workers == 1 else "1")
    cores = sorted(os.sched_getaffinity(0))
    share = threads or max(1, len(cores) // workers)
    lists = [cores[at * share : (at + 1) * share] or cores[-1:] for at in range(workers)]
    bound = "|".join(",".join(map(str, one)) for one in lists)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    if os.environ[IN_PROCESS] == "0":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def _copy_settings(base: Path, target: Path, dtype: str) -> None:
    for pattern in SETTINGS:
        for path in base.glob(pattern):
            if not path.name.endswith(".index.json") and path.name != ORIGIN:
                shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
