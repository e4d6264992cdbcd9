"""The table of the forgetting study: which runs there are, and the flags of each.

Two scales. "cpu" is what the committed results are of: SmolLM2-135M-Instruct on two cores. "gpu"
has the papers' settings (arXiv 2509.24372, 2605.30148) for a model that the user names; it has not
yet been run.

Arms at one seed share run seed and prompts, so that ES and its variants see the same draws. The
larger population has three times the members over a third of the prompts a generation (at the gpu
scale four times, over a quarter): as many answers and as many generations over more directions.

At the cpu scale GRPO has half of ES's FLOPs, to save time (six generations of 64 answers against
eight of 384), and one more run of as many FLOPs has a lower learning rate; at the gpu scale the
FLOPs are equal.

How lambda was carried from 500 generations to 8: by what is left when units are taken away. l2:
alpha * lambda * T is 2.5 in the paper (5e-3 * 500) and 2.4 here (0.3 * 8). l1: alpha * lambda * T
over the random walk alpha * sqrt(T / N) is 1.2 in the paper (lambda 0.01) and 1.1 here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PRIOR = HERE.relative_to(ROOT) / "prior"
SEEDS = (1, 2, 3)

PRIOR_TASKS = (
    "questions:capitals",
    "questions:opposites",
    "questions:plurals",
    f"{PRIOR / 'copying.jsonl'}",
    f"{PRIOR / 'writing.jsonl'}@{HERE.relative_to(ROOT) / 'prior_rewards.py'}:fluent",
)


def short_name(task: str) -> str:
    """A prior task's name in tables and figures."""
    return Path(task.partition("@")[0].partition(":")[2] or task.partition("@")[0]).stem


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    key: fit for a folder's name; command: of esfast; flags: beside the scale's; decay: alpha *
    lambda where the arm is a point of the l2 sweep (0: plain ES), else None; main: whether it is
    one of the arms that are compared, or a point of the sweep alone.
    """

    key: str
    name: str
    command: str
    flags: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS
    decay: float | None = None
    main: bool = True


@dataclass(frozen=True)
class StudyRun:
    """One run: an arm at a seed."""

    arm: Arm
    seed: int

    @property
    def key(self) -> str:
        """Names its folder and its rows."""
        return f"{self.arm.key}-seed{self.seed}"


@dataclass(frozen=True)
class Scale:
    """A study. Flags: of every training, of a command's, of the diagnosis of one run, of the
    generations at which the change of an ES run is measured, and of the controls of equal norm.

    model: None where the user has to name one; jobs: runs at once; threads: of each; alpha,
    population_size, generations: of the plain ES arm, for what the laws predict.
    """

    name: str
    model: str | None
    shared: tuple[str, ...]
    of_command: dict[str, tuple[str, ...]]
    diagnostics: tuple[str, ...]
    drift_every: tuple[str, ...]
    controls: tuple[str, ...]
    arms: tuple[Arm, ...]
    jobs: int
    threads: int | None
    alpha: float
    population_size: int
    generations: int

    def runs(self) -> list[StudyRun]:
        """Seed by seed, so that a study that is stopped early has whole seeds."""
        seeds = sorted({seed for arm in self.arms for seed in arm.seeds})
        return [StudyRun(arm, seed) for seed in seeds for arm in self.arms if seed in arm.seeds]


def decay_flags(kind: str, product: float, alpha: float) -> tuple[str, ...]:
    """Flags of anchored decay with alpha * lambda = `product`."""
    return ("--weight-decay-type", kind, "--weight-decay-lambda", f"{product / alpha:.6g}")


def population_flags(size: int, prompts: int) -> tuple[str, ...]:
    """Members and prompts of a generation."""
    return ("--population-size", str(size), "--prompts", str(prompts))


def es_arms(
    alpha: float, size: int, prompts: int, larger: int, l1: float, l2: float
) -> tuple[Arm, ...]:
    """ES, with l1, with l2 (both as alpha * lambda), and with a population `larger` times as large
    over as much fewer prompts."""
    usual = population_flags(size, prompts)
    many = population_flags(larger * size, prompts // larger)
    return (
        Arm("es", f"ES, N {size}", "train", usual, decay=0.0),
        Arm("es-l1", "ES + l1", "train", (*usual, *decay_flags("l1", l1, alpha))),
        Arm("es-l2", "ES + l2", "train", (*usual, *decay_flags("l2", l2, alpha)), decay=l2),
        Arm("es-large", f"ES, N {larger * size}", "train", many),
    )


def grpo_arm(rate: str, prompts: int, group: int, generations: int) -> Arm:
    """GRPO at a learning rate; docs/forgetting.md says how the rate was found.

    An answer costs ES one pass forward, and GRPO that one, one more and one backward, which counts
    as two (esfast/cost.py): at equal FLOPs GRPO has a quarter of the answers.
    """
    size = ("--prompts", str(prompts), "--group-size", str(group))
    flags = (*size, "--generations", str(generations), "--learning-rate", rate)
    return Arm("grpo", "GRPO", "grpo", flags)


def sweep_arms(alpha: float, usual: tuple[str, ...], products: tuple[float, ...]) -> list[Arm]:
    """The points of the l2 sweep that are not a main arm, at the first seed alone."""
    return [
        Arm(
            f"sweep-{product:g}",
            f"ES + l2, alpha lambda {product:g}",
            "train",
            (*usual, *decay_flags("l2", product, alpha)),
            seeds=SEEDS[:1],
            decay=product,
            main=False,
        )
        for product in products
    ]


PRIOR_FLAGS = ("--prior-tasks", ",".join(PRIOR_TASKS), "--prior-size", "32", "--prior-samples", "0")

KL_TASKS = PRIOR_TASKS[-1:]


def kl_flags(task: str, count: int, tokens: int) -> tuple[str, ...]:
    """KL on the target's and a prior task's prompts; scores are known from the run."""
    return (
        *("--task", task, "--kl-prompts", ",".join(KL_TASKS), "--kl-count", str(count)),
        *("--kl-tokens", str(tokens), "--score", "0", "--no-plots"),
    )


def control_flags(task: str, count: int) -> tuple[str, ...]:
    """Scores on the target and every prior task, of changes that are brought to one length."""
    asked = ("--task", task, "--kl-prompts", ",".join(PRIOR_TASKS), "--score", str(count))
    return (*asked, "--kl-dtype", "bfloat16", "--no-plots")


CPU_ALPHA = 0.006
CPU = Scale(
    name="cpu",
    model="smollm2-135m",
    shared=(
        *("--task", "arithmetic", "--generations", "8", "--eval-size", "96", "--eval-every", "2"),
        *(*PRIOR_FLAGS, "--prior-every", "2", "--no-plots"),
    ),
    of_command={"train": ("--sigma", "0.003", "--alpha", f"{CPU_ALPHA}"), "grpo": ()},
    diagnostics=kl_flags("arithmetic", count=10, tokens=16),
    drift_every=("--every", "4"),
    controls=control_flags("arithmetic", 48),
    arms=(
        *es_arms(CPU_ALPHA, size=16, prompts=24, larger=3, l1=6e-4, l2=0.3),
        grpo_arm("3e-5", prompts=8, group=8, generations=6),
        replace(
            grpo_arm("1e-5", prompts=12, group=8, generations=8),
            key="grpo-1e-5",
            name="GRPO, learning rate 1e-5",
            seeds=SEEDS[:1],
            main=False,
        ),
        *sweep_arms(CPU_ALPHA, population_flags(16, 24), (0.005, 0.05, 0.6)),
    ),
    jobs=2,
    threads=1,
    alpha=CPU_ALPHA,
    population_size=16,
    generations=8,
)

GPU_ALPHA = 5e-4
GPU = Scale(
    name="gpu",
    model=None,
    shared=(
        *("--task", "countdown", "--generations", "500", "--eval-size", "200"),
        *("--eval-every", "25", *PRIOR_FLAGS, "--prior-every", "25", "--no-plots"),
        *("--device", "cuda", "--batch-size", "256"),
    ),
    of_command={"train": ("--sigma", "0.001", "--alpha", f"{GPU_ALPHA}"), "grpo": ()},
    diagnostics=(*kl_flags("countdown", count=64, tokens=64), "--device", "cuda"),
    drift_every=("--every", "100"),
    controls=(*control_flags("countdown", 200), "--device", "cuda"),
    arms=(
        *es_arms(GPU_ALPHA, size=30, prompts=200, larger=4, l1=5e-6, l2=5e-3),
        grpo_arm("1e-6", prompts=150, group=10, generations=500),
        *sweep_arms(GPU_ALPHA, population_flags(30, 200), (5e-4, 1.5e-3, 1.5e-2, 5e-2)),
    ),
    jobs=1,
    threads=None,
    alpha=GPU_ALPHA,
    population_size=30,
    generations=500,
)
"""The papers' settings; a model of 1.5-3 B parameters is what they are for. Not yet run."""

SCALES = {scale.name: scale for scale in (CPU, GPU)}
"""By the name on the command line."""
