"""Trains SD-DiT: `sddit train [--preset NAME] [--dataset_name NAME] [options]`.

On several devices it is `accelerate launch -m sddit train`, or `accelerate launch train_sddit.py`.

`--method dit`, `maskdit`, `mdt` and `tread` train what it is compared with instead.

Without options it trains on handwritten digits and leaves a pipeline, pictures and curves in `sddit-digits/`.
Everything random in a step, and every schedule, follows from the seed and the number of the step alone.
"""

from functools import partial

from sddit_diffusers.cli import one_line_errors
from sddit_diffusers.training.building import build_objective, build_process
from sddit_diffusers.training.memory import dry_run
from sddit_diffusers.training.options import parse
from sddit_diffusers.training.trainer import training


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors("train_sddit.py"):
        config = parse(arguments)
        config.check_choices()
        if config.dry_run:
            return dry_run(config, config.preset, partial(build_objective, process=build_process(config)))
        with training(config) as trainer:
            trainer.run()
            trainer.accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main()
