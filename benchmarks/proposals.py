"""PREDICTIONS of what other numbers in the kernels and operators would gain: what to try first on a GPU.

python benchmarks/proposals.py FOLDER [--device H200]      a folder that candidates.py compiled into
"""

import argparse
import pathlib

import candidates
import devices
import roofline
import show

ALIKE = 0.01  # of a time, below which the model tells nothing
MORE = {  # sizes beside those that a GPU is to measure
    "column_sum": {"rms_norm": [{"tokens": 8192, "hidden": 4096}]},
    "norm's backward in a loop": {name: [{"tokens": 2048, "hidden": 32768}] for name in ("rms_norm", "layer_norm")},
    "CHUNK": {"linear_cross_entropy": [candidates.HEAD | {"tokens": 4096}]},
}


class Model(roofline.Model):
    """A device, with kernels of one trial in the place of the shipped ones."""

    def __init__(self, name, folder):
        super().__init__(name)
        self.shipped, self.compiled = self.pack, candidates.opened(folder, self.device.arch)

    def predicted(self, choice, trial, operator, sizes):
        self.pack = candidates.Tried(self.shipped, self.compiled, choice, trial)
        try:
            with candidates.put_back():
                candidates.put(candidates.CHOICES[choice], trial)
                return self.predict(operator, sizes, candidates.DTYPE)
        finally:
            self.pack = self.shipped


def rows(name, folder):
    """(choice, operator, sizes, pass, predicted as shipped, [(trial, predicted)]) of what a choice has a part in."""
    model = Model(name, folder)
    for choice, of in candidates.CHOICES.items():
        # the model knows of no loads ahead of their turn
        trials = [t for t in candidates.compiled_trials(model.compiled, choice) if t.get(candidates.STAGES, 1) == 1]
        for operator, first in of.cases.items():
            for sizes in [first, *MORE.get(choice, {}).get(operator, [])]:
                plain = model.predict(operator, sizes, candidates.DTYPE)
                made = [(trial, model.predicted(choice, trial, operator, sizes)) for trial in trials]
                for which in of.passes:
                    yield choice, operator, sizes, which, plain[which], [(trial, some[which]) for trial, some in made]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--device", choices=devices.DEVICES, default="H200")
    given = parser.parse_args()
    head = ["choice", "operator", "sizes", "pass", "tried", "predicted now, us", "then, us", "gain", "gain, no overlap"]
    lines, alike = [], 0
    for choice, operator, sizes, which, now, made in rows(given.device, given.folder):
        for trial, then in made:
            gains = [1 - then[key] / now[key] for key in ("us", "us_unhidden")]
            if max(map(abs, gains)) < ALIKE:
                alike += 1
                continue
            case = choice, operator, roofline.sizes_text({"sizes": sizes}), which, candidates.text(trial)
            lines.append([*case, f"{now['us']:.1f}", f"{then['us']:.1f}", *(f"{gain:.1%}" for gain in gains)])
    show.table(f"{roofline.LABEL}: {given.device}, {candidates.DTYPE}", head, lines, right=head[5:])
    print(f"{alike} others, those that are shipped among them, are predicted to differ by less than {ALIKE:.0%}")


if __name__ == "__main__":
    main()
