"""What is wrong with a checkpoint, all of it at once."""


class ConvertError(ValueError):
    """A checkpoint that cannot be converted as asked; nothing was written."""


def said(error):
    """The first line of another library's error; its name, if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
