"""Labelled images in parts that are read independently of one another, as a preparation takes them."""

from collections.abc import Iterator
from contextlib import closing

from .order import read_out
from .pictures import MOST_CLASSES, find_columns, load_rows, pictures_of


class Source:
    """Labelled images in units: contiguous parts of a dataset, read independently of one another.

    Args:
        name, split, config_name: of the dataset.
        image_column: name of the column of pictures; "" finds it where there is one.
        label_column: name of the column of labels, numbers or names; "" leaves them out.
        streaming: read it as it comes, in the units that it comes in.
        unit_rows: rows of a unit at most, where it does not stream.

    Attributes:
        image_column: where the pictures are.
        count: number of images; None for a stream, which tells at its end.
        units: number of units.

    Raises:
        ValueError: a dataset or a column that is not there, or an empty dataset.
    """

    def __init__(
        self, name: str, image_column: str, label_column: str, split: str, config_name: str, streaming: bool,
        unit_rows: int,
    ):  # fmt: skip
        self.name, self.label_column = name, label_column
        rows = load_rows(name, split, config_name, streaming)
        try:
            first = next(iter(rows.take(1).with_format("arrow")), None)
        except Exception as error:  # whatever the Hub, the network and the readers raise
            raise ValueError(f"The dataset {name!r} cannot be read: {error}") from error
        if first is None or not len(first):
            raise ValueError(f"{name} is empty.")
        image_column = find_columns(name, first.column_names, rows.features, image_column, label_column)
        columns = [image_column, *({label_column} - {image_column, ""})]
        self.image_column = image_column
        self.class_names = getattr((rows.features or {}).get(label_column), "names", None)
        self.has_named_labels = bool(label_column) and isinstance(first[label_column][0].as_py(), str)
        rows = pictures_of(rows.select_columns(columns), image_column, name)
        if streaming:
            self.count, self.units = None, rows.num_shards
        else:
            self.count, self.units = len(rows), -(-len(rows) // unit_rows)
            rows = rows.to_iterable_dataset(num_shards=self.units)
        self._rows = rows

    def blocks(self, unit: int, skipped: int, size: int) -> Iterator[list[tuple]]:
        """A unit's pairs of file and label after the first ones, `size` at a time.

        The last block, and no other, is shorter than `size`; it may be empty.
        """
        block = []
        with closing(read_out(self._rows.shard(self.units, unit).skip(skipped))) as rows:
            for row in rows:
                place = self.place(unit, skipped + len(block))
                block.append((row[self.image_column], self._label(row, place)))
                if len(block) == size:
                    yield block
                    block, skipped = [], skipped + size
            yield block

    def place(self, unit: int, row: int) -> str:
        """How a row is called in messages."""
        if self.count is None:
            return f"Row {row} of part {unit} (of 0 to {self.units - 1}) of {self.name}"
        size, larger = divmod(self.count, self.units)  # the first units have a row more
        return f"Row {unit * size + min(unit, larger) + row} of {self.name}"

    def _label(self, row: dict, place: str) -> str | None:
        """A label as text, be it a number or a name."""
        if not self.label_column:
            return None
        label, allowed = row[self.label_column], len(self.class_names or ()) or MOST_CLASSES
        if self.has_named_labels and isinstance(label, str):
            return label
        if not self.has_named_labels and isinstance(label, int) and 0 <= label < allowed:
            return str(label)
        kind = "names" if self.has_named_labels else f"integers from 0 to {allowed - 1}"
        raise ValueError(f"{place} has the label {label!r}; allowed are {kind}.")
