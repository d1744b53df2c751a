"""What docs/extending.md says is carried out, by its own code."""

import json
import re
from pathlib import Path

import pytest
import small_runs
from small_runs import HEAD, SMALL

import train_sddit
from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline
from sddit_diffusers.training import auxiliaries, methods, processes
from sddit_diffusers.training.auxiliary import AuxiliaryLoss
from sddit_diffusers.training.metrics import read_metrics

PAGE = (Path(__file__).parents[2] / "docs/extending.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_examples_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = [auxiliaries.AUXILIARIES, methods.METHODS, processes.PROCESSES]
    earlier = [dict(table) for table in tables]
    main, small = train_sddit.main, SMALL[len(HEAD) :]
    plain = {name: value for name, value in json.loads(small[1]).items() if "decoder" not in name}

    def smaller(arguments):
        network = plain if "edges" in arguments or "dit" in arguments else json.loads(small[1])
        main([*small[2:], "--num_validation_images", "0", "--transformer", json.dumps(network), *arguments])

    monkeypatch.setattr(train_sddit, "main", smaller)
    try:
        variables = {}
        for example in EXAMPLES:
            exec(example, variables)
    finally:
        for table, rows in zip(tables, earlier, strict=True):
            table.clear()
            table.update(rows)
    assert len(EXAMPLES) == 3
    for folder, metric in (("with-spread", "loss_spread"), ("with-edges", "loss_edges")):
        rows = read_metrics(tmp_path / folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3] and all(row[metric] > 0 for row in rows)
        assert all(row["loss"] > row["loss_generative"] for row in rows)
    assert SDDiTPipeline.from_pretrained(tmp_path / "with-edm2").scheduler.config.p_mean == -0.4


@pytest.mark.parametrize(
    ("kept", "changed", "message"),
    [
        (["--auxiliary", "spread"], ["--auxiliary", "none"], r"auxiliaries: \['spread'\] there, \[\] here"),
        (["--process", "edm2"], ["--process", "edm"], "process: edm2 there, edm here"),
    ],
)
def test_a_run_goes_on_with_its_process_and_losses_alone(kept, changed, message, tmp_path, monkeypatch):
    spread = auxiliaries.Auxiliary("", lambda *_: Constant())
    monkeypatch.setitem(auxiliaries.AUXILIARIES, "spread", spread)
    monkeypatch.setitem(processes.PROCESSES, "edm2", processes.ProcessRow("", lambda _: EDMHeunScheduler()))
    saving = ["--max_train_steps", 1, "--checkpointing_steps", 1]
    going_on = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    without = ["--auxiliary", "none"] if "--process" in kept else []
    small_runs.train(tmp_path, *saving, *without, *kept, "--method", "maskdit")
    with pytest.raises(SystemExit, match=message):
        small_runs.train(tmp_path, *going_on, *without, *changed, "--method", "maskdit")
    assert len(small_runs.train(tmp_path, *going_on, *without, *kept, "--method", "maskdit")) == 2


class Constant(AuxiliaryLoss):
    """A loss without weights, which a state dict does not tell."""

    name = "constant"

    def __init__(self):
        super().__init__(weight=1.0)

    def forward(self, view, process, draws):
        return {"loss_constant": view.tokens.new_ones(())}
