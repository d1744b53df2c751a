"""Trains SD-DiT: `accelerate launch train_sddit.py [--preset NAME] [--dataset_name NAME] [options]`.

`--method dit`, `maskdit` and `mdt` train what it is compared with instead.

Without options it trains on handwritten digits and leaves a pipeline, pictures and curves in `sddit-digits/`.
Everything random in a step, and every schedule, follows from the seed and the number of the step alone.
"""

import dataclasses

import torch
from accelerate import Accelerator

from sddit_diffusers.cli import one_line_errors
from sddit_diffusers.training.building import build_objective
from sddit_diffusers.training.configuration import CHECKPOINTING
from sddit_diffusers.training.memory import memory_lines
from sddit_diffusers.training.objective import Objective
from sddit_diffusers.training.options import TrainingConfig, parse
from sddit_diffusers.training.trainer import training


def dry_run(config: TrainingConfig) -> None:
    """Prints the memory that a step takes."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision or None)
    device, dtype = accelerator.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}
    network = config.network()

    def build(checkpointing: str) -> Objective:
        changed = dataclasses.replace(config, gradient_checkpointing=checkpointing)
        return build_objective(changed, network, device)

    accelerator.print(
        f"{config.preset}, {network['sample_size']} x {network['sample_size']}, "
        f"mixed precision {accelerator.mixed_precision}, on one {device}"
    )
    if accelerator.is_main_process:
        precision = dtype.get(accelerator.mixed_precision)
        for line in memory_lines(build, config.train_batch_size, device, precision, CHECKPOINTING):
            print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors("train_sddit.py"):
        config = parse(arguments)
        config.check_choices()
        if config.dry_run:
            return dry_run(config)
        with training(config) as trainer:
            trainer.run()
            trainer.accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main()
