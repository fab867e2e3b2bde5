"""Ten faults are noticed, and all that are listed are still faults of the package. `make mutate` tries them all."""

import pathlib
import subprocess
import sys

import mutate

FAULTS = mutate.read_faults()


def test_every_fault_is_of_the_package_as_it_is():
    for fault in FAULTS:
        source = (mutate.package() / fault.file).read_text()
        assert fault.apply(source) != source
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS) > 100


def test_every_kernel_is_broken():
    kernels = {path.name for path in (mutate.package() / "_triton").glob("*.py")}
    assert kernels == {pathlib.Path(fault.file).name for fault in FAULTS if fault.file.startswith("_triton/")}


def mutated(*arguments):
    return subprocess.run([sys.executable, mutate.__file__, "--jobs", "1", *arguments], capture_output=True, text=True)


def test_ten_faults_are_noticed():
    assert sum(fault.smoke for fault in FAULTS) == 10
    done = mutated("--smoke")
    assert (done.returncode, "10 of 10 faults noticed" in done.stdout) == (0, True), done.stdout + done.stderr


def test_what_does_not_count_as_noticed(tmp_path):
    faults = tmp_path / "faults.txt"
    faults.write_text("""
_op.py | test_operators.py -k "source and rms_norm"
- PUBLIC = []
+ PUBLIC = list()
- PUBLIC = []
+ PUBLIC = [
""")
    done = mutated("--faults", str(faults))
    assert done.returncode == 1
    assert "1/2 NOT NOTICED" in done.stdout
    assert "2/2 NOT TRIED, exit code 4" in done.stdout  # no test ran
    assert "0 of 2 faults noticed" in done.stdout
