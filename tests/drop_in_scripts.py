"""A script of published ES workers over `collective_rpc`, what it asks an engine, and esfast's own
loop with the same rewards.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
from vllm_tiny import OPTIONS, PROMPTS

from esfast import EvolutionStrategy, Weights, member_seed

SIGMA, ALPHA, POPULATION = 0.02, 0.01, 4


def new_llm(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    extension = "esfast.engines.vllm_worker.WorkerExtension"  # the one line of docs/drop_in.md
    return LLM(str(folder), dtype="bfloat16", worker_extension_cls=extension, **OPTIONS, **options)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rpc(llm: Any, method: str, *arguments: Any) -> Any:
    return llm.collective_rpc(method, args=arguments)[0]


def checksum(llm: Any) -> str:
    return str(rpc(llm, "weights_checksum"))


def answers(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate(PROMPTS, wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def reward(tokens: list[list[int]]) -> float:
    return sum(map(sum, tokens)) / 1000


def script(llm: Any, generations: int) -> list[list[float]]:
    """What people run, but that the seeds are derived, so that another loop has the same."""
    kept = []
    for generation in range(generations):
        seeds = [member_seed(0, generation, n) for n in range(POPULATION)]
        rewards = []
        for seed in seeds:
            llm.collective_rpc("perturb_self_weights", args=(seed, SIGMA, False))
            rewards.append(reward(answers(llm)))
            llm.collective_rpc("restore_self_weights", args=(seed, SIGMA))
        normal = (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) + 1e-8)
        llm.collective_rpc(
            "update_weights_from_seeds", args=(seeds, normal.tolist(), ALPHA, POPULATION)
        )
        llm.collective_rpc("broadcast_all_weights", args=(0,))
        kept.append(rewards)
    return kept


def own_loop(plain: Weights, rewards: list[list[float]]) -> str:
    es = EvolutionStrategy(
        plain.table, sigma=SIGMA, alpha=ALPHA, population_size=POPULATION, shaping="z_score"
    )
    for one in rewards:
        for _ in es.population():
            pass
        es.step(one)
    return es.weights.checksum()
