"""What docs/extending.md says is carried out, by its own code."""

import json
import re
from pathlib import Path

from small_runs import HEAD, SMALL

import train_sddit
from sddit_diffusers import SDDiTPipeline
from sddit_diffusers.training import auxiliaries, methods, processes
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
