"""The scores, what they are computed by, and what they are called in a run's metrics."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What is to be known of a score.

    Attributes:
        title: for people.
        better: "↓" where less is better, "↑" where more is.
        part: of an extractor's outputs, from which it is computed: "features", "logits" or "spatial".
        is_relative: whether it compares with a reference.
        statistics: in an `.npz`, the mean and the covariance that can take the place of a reference's images.
        inception_dim: of these where Inception made them.
    """

    title: str
    better: str
    part: str = "features"
    is_relative: bool = True
    statistics: tuple[str, ...] = ()
    inception_dim: int | None = None

    @property
    def heading(self) -> str:
        """Of a table."""
        return f"{self.title} {self.better}"


SCORES = {
    "fid": Score("FID", "↓", statistics=("mu", "sigma"), inception_dim=2048),  # names of ADM and EDM
    "sfid": Score("sFID", "↓", "spatial", statistics=("mu_s", "sigma_s"), inception_dim=2023),  # of ADM
    "is": Score("Inception Score", "↑", "logits", is_relative=False),
    "precision": Score("Precision", "↑"),
    "recall": Score("Recall", "↑"),
    "kid": Score("KID", "↓"),
    "fd_dinov2": Score("FD-DINOv2", "↓", statistics=("mu_dinov2", "sigma_dinov2")),  # of DINOv2's features
}

JUDGED = ("fid", "precision", "recall")  # of a run's samples, the last two where they can be

# The networks that one chooses from, and the parts that they give.
EXTRACTORS = {
    "inception": ("features", "logits", "spatial"),
    "classifier": ("features", "logits"),
    "resnet": ("features", "logits"),  # held out: it guides no training, as the classifier may
    "pixels": ("features",),
}


def metric_name(score: str, extractor: str) -> str:
    """What a score is called in metrics.jsonl."""
    return score if extractor == "inception" else f"{score}_{extractor}"


# The score and the extractor of such a name.
METRICS = {metric_name(score, by): (score, by) for score in SCORES for by in EXTRACTORS}


def is_upward(metric: str) -> bool:
    """Whether of a metric more is better; of one that is no score it is taken that less is."""
    return metric in METRICS and SCORES[METRICS[metric][0]].better == "↑"
