"""The TRL side of `vs_trl.py`: GRPOTrainer on the same files. Run by the python of TRL's own environment, which has no Verst.

    python benchmarks/vs_trl_trainer.py SETTINGS.json

What is not the task's is set for the shortest run that TRL can make of it: no evaluation, reports, checkpoints, progress bar, gradient
checkpointing (TRL's default) or reference model; transformers generates in the trainer's process, a whole batch at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset  # pyright: ignore[reportMissingImports] - in TRL's environment
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
from vs_trl_reward import of_batch  # pyright: ignore[reportMissingImports] - beside this file


def main(settings: dict[str, Any]) -> None:
    config = GRPOConfig(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["groups"] * settings["group_size"],
        num_generations=settings["group_size"],
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        max_completion_length=settings["max_new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",  # every token of a batch counts the same
        scale_rewards="group",
        epsilon=0.2,
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    GRPOTrainer(model=settings["model"], reward_funcs=of_batch, args=config, train_dataset=prompts).train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
