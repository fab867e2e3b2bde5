"""What is wrong with a checkpoint, all of it at once."""


class ConvertError(ValueError):
    """A checkpoint that cannot be converted as asked; nothing was written."""


class Problems:
    """Collected while planning, so that one message names every key that does not fit."""

    def __init__(self, title):
        self.title, self.lines = title, []

    def add(self, line):
        self.lines.append(str(line))

    def end(self):
        if self.lines:
            found = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
            raise ConvertError("\n  ".join([f"{self.title}: {found}, nothing was written", *self.lines]))
