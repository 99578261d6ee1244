"""The quickstart: a small model made from scratch, taught by an imperfect teacher, then put right by reinforcement learning.

The task is "Alice has 3 brothers and she also has 2 sisters. How many sisters does Alice's brother have?" (reasoning-gym's `aiw`). Only
30 % of the teacher's demonstrations are right; the others forget Alice herself. Supervised fine-tuning learns the task together with the
mistake. GRPO then needs no answers to imitate, only the reward for right ones, and unlearns it. Neither sees the held-out prompts.

    python examples/quickstart.py [DIRECTORY]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import verst
from verst.recipes.tiny import build_tiny_model, write_demonstrations

HERE = Path(__file__).parent


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart").absolute()
    for made in ("model", "sft", "grpo"):  # by an earlier quickstart; what else is there is not its own
        shutil.rmtree(root / made, ignore_errors=True)
    build_tiny_model(root / "model")
    write_demonstrations(root / "demonstrations.jsonl")
    model, demonstrations = f"model.path={root / 'model'}", f"data.path={root / 'demonstrations.jsonl'}"

    print("1. supervised fine-tuning on demonstrations of which 30 % are right")
    taught = verst.train(HERE / "quickstart_sft.yaml", overrides=[f"run.dir={root}", model, demonstrations], echo=print)
    print("2. GRPO from there, with a reward for right answers only")
    verst.train(HERE / "quickstart_grpo.yaml", overrides=[f"run.dir={root}", f"model.path={taught.model}"], echo=print)


if __name__ == "__main__":
    main()
