"""A progress bar on a terminal, a line for every tenth elsewhere."""

import time


class Progress:
    """Without a stream nothing is shown."""

    def __init__(self, total, stream=None):
        self.total, self.done, self.shown = max(total, 1), 0, 0
        self.stream = stream
        self.live = stream is not None and stream.isatty()
        self.start = time.monotonic()

    def add(self, size, name):
        self.done += size
        if self.stream is None:
            return
        if self.live or self.done * 10 // self.total > self.shown or self.done == self.total:
            self.shown = self.done * 10 // self.total
            self.show(name)

    def show(self, name):
        part, seconds = min(self.done / self.total, 1), max(time.monotonic() - self.start, 1e-9)
        speed = self.done / seconds
        bar = f"{'#' * int(20 * part):<20} " if self.live else ""
        left = (self.total - self.done) / max(speed, 1)
        done = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {speed / 1e6:,.0f} MB/s"
        text = f"{bar}{part:4.0%}  {done}, {left:,.0f} s left  {name}"
        self.stream.write(f"\r\x1b[K{text[:110]}" if self.live else text + "\n")
        self.stream.flush()

    def end(self):
        if self.live:
            self.stream.write("\r\x1b[K")
