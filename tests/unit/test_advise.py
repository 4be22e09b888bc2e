"""`python -m tf_regtopk.advise`."""

import json
import math
import os
import re
import subprocess
import sys

from absl import flags
import paths
import planning_jobs
import pytest

import tf_regtopk
from tf_regtopk import advise
from tf_regtopk.planning import cost_model
from tf_regtopk.planning import figure
from tf_regtopk.planning import job as job_lib
from tf_regtopk.planning import network as network_lib
from tf_regtopk.planning import report
from tf_regtopk.sizes import payload as payload_sizes


def test_wrong_arguments():
    def make_network(**kwargs):
        return network_lib.Network(
            **({"bandwidth": 1e9, "latency": 0.0} | kwargs)
        )

    for make, argument, value in (
        (planning_jobs.make_job, "parameters", 0),
        (planning_jobs.make_job, "parameters", 1.5),
        (planning_jobs.make_job, "parameters", 2**31),
        (planning_jobs.make_job, "workers", 0),
        (planning_jobs.make_job, "device", "a100"),
        (planning_jobs.make_job, "step_seconds", -1.0),
        (planning_jobs.make_job, "step_seconds", math.nan),
        (planning_jobs.make_job, "density", 0),
        (planning_jobs.make_job, "density", 1.1),
        (planning_jobs.make_job, "values", "float8"),
        (planning_jobs.make_job, "devices_per_worker", 0),
        (planning_jobs.make_job, "overlap", 1.5),
        (planning_jobs.make_job, "memory_bandwidth", 0),
        (make_network, "bandwidth", 0.0),
        (make_network, "latency", -1.0),
        (make_network, "latency", "5ms"),
        (make_network, "local_bandwidth", math.inf),
        (make_network, "local_latency", -1e-9),
    ):
        message = f"`{argument}` must be .* Received: {argument}="
        with pytest.raises((TypeError, ValueError), match=message):
            make(**{argument: value})


def test_a_single_device_has_nothing_to_exchange():
    with pytest.raises(ValueError, match="a single device exchanges nothing"):
        planning_jobs.make_job(workers=1)


def test_import_defines_no_flags():
    assert "step_time" not in flags.FLAGS


def test_import_is_that_of_a_program():
    """The command alone leaves out what it does not need."""
    assert tf_regtopk.TopK(0.1).num_selected(100) == 10


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables of processes that cannot import TensorFlow or Keras."""
    path = tmp_path_factory.mktemp("without_tensorflow")
    needless = ("keras", "tensorflow", "tensorflow_datasets")
    (path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({needless}))\n"
    )
    searched = [str(path), str(paths.ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(searched)}


@pytest.fixture
def run(environment):
    """A function that runs the command, without TensorFlow and Keras."""

    def run(**arguments):
        args = [f"--{name}={value}" for name, value in arguments.items()]
        return subprocess.run(
            [sys.executable, "-m", "tf_regtopk.advise", *args],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_other_programs_need_tensorflow(environment):
    """So that the tests of the command can tell whether it does."""
    result = subprocess.run(
        [sys.executable, "-c", "import tf_regtopk"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert re.search("import of (keras|tensorflow) halted", result.stderr)


def test_command_advises_to_compress(run):
    result = run(
        parameters="11.2e6",
        workers=4,
        bandwidth="100Mbit",
        latency="100us",
        step_time="180ms",
        devices_per_worker=2,
        sweep=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "a100, 1.73 TB/s of memory (85% of the data" in result.stdout
    assert "No device was named, and a100 is assumed. " in result.stdout
    names = {
        name for name, m in planning_jobs.METHODS.items() if not m.has_owners
    }
    assert {line.split("  ")[0] for line in lines} >= names
    [header] = [i for i, line in enumerate(lines) if line[:7] == "workers"]
    swept = [int(line.split()[0]) for line in lines[header + 1 : header + 13]]
    assert swept == [2**i for i in range(1, 13)]
    assert "owners" in lines[header] and lines[header + 1].split()[-2] == "-"
    assert "\nCompress: " in result.stdout
    assert max(len(line) for line in lines[header + 14 :]) <= 80
    assert "\nThe answer would be another with one of these " in result.stdout


def test_command_advises_not_to(run):
    result = run(
        parameters="1e5",
        workers=4,
        bandwidth="25Gbit",
        latency="10us",
        step_time="20ms",
        device="cpu",
    )
    assert result.returncode == 0, result.stderr
    assert "\nDo not compress: " in result.stdout
    assert "hierarchical" not in result.stdout
    assert "a sparse step starts in 8.00 ms;" in " ".join(result.stdout.split())


def test_command_knows_a_single_host(run, tmp_path):
    """Its GPUs exchange over NVLink; no network is asked for."""
    picture = tmp_path / "advise.png"
    result = run(
        parameters="340M",
        workers=1,
        devices=8,
        step_time="150ms",
        device="h100",
        plot=picture,
    )
    assert result.returncode == 0, result.stderr
    assert "\nDo not compress: " in result.stdout
    assert "3.06 Tbit/s from device to device" in result.stdout
    assert "devices_per_worker" in result.stdout
    assert picture.stat().st_size > 1000


def flags_of(**arguments):
    """The values of the command's flags, without a command."""
    values = flags.FlagValues()
    advise.define_flags(values)
    values(["advise", *(f"--{k}={v}" for k, v in arguments.items())])
    return values


RESNET = {"parameters": "25.6M", "workers": 16, "step_time": "180ms"}
TEN_GIGABIT = {"bandwidth": "10Gbps", "latency": "50us"}


def test_a_missing_device_is_said_where_it_matters():
    (job, network), remark, others = advise.cases(
        flags_of(**RESNET, **TEN_GIGABIT)
    )
    assert "ASSUMED" in remark
    text = report.other_devices(job, others)
    assert text.startswith("THE ANSWER DEPENDS ON THE DEVICE")
    assert "compress: cpu;" in text
    del network
    _, remark, others = advise.cases(
        flags_of(**RESNET, **TEN_GIGABIT, device="v100")
    )
    assert not remark and not others


def test_compression_is_that_of_the_recommended_method():
    (job, _), *_ = advise.cases(
        flags_of(**RESNET, **TEN_GIGABIT, device="v100", compression=100)
    )
    optimizer = tf_regtopk.methods.recommended(0.1, compression=100)
    assert job.density == optimizer.sparsifier.density
    assert job.values == optimizer.codec.values
    # Densities have three digits.
    assert payload_bytes(job) == pytest.approx(
        job.gradient_bytes / 100, rel=0.005
    )


def payload_bytes(job):
    """The bytes of a payload in the shortest index code."""
    k = job.num_selected
    return 4 * payload_sizes.num_words("auto", job.values, k, job.parameters)


@pytest.mark.parametrize("entries", [{"density": 0.001}, {"values": "sign"}])
def test_compression_is_alone(entries):
    with pytest.raises(ValueError, match="must be left out with `compression`"):
        advise.cases(
            flags_of(**RESNET, **TEN_GIGABIT, **entries, compression=100)
        )


def test_too_little_compression():
    with pytest.raises(ValueError, match="`compression` must be at least 40"):
        advise.cases(flags_of(**RESNET, **TEN_GIGABIT, compression=30))


@pytest.mark.parametrize("rate, kind", [("25GB", "a CPU"), ("1TB", "a GPU")])
def test_a_bandwidth_alone_is_tried_as_both_kinds(rate, kind):
    (job, _), remark, others = advise.cases(
        flags_of(**RESNET, **TEN_GIGABIT, memory_bandwidth=rate)
    )
    assert job.device.name == kind
    assert "ASSUMED" in remark
    assert [j.device.name for j, _ in others] == ["a CPU", "a GPU"]
    assert len({j.device.memory_bandwidth for j, _ in others}) == 1


def test_measure(monkeypatch):
    monkeypatch.setattr(
        advise.devices, "measure_memory_bandwidth", lambda: 12.0e9
    )
    (job, _), remark, others = advise.cases(
        flags_of(**RESNET, **TEN_GIGABIT, measure=True)
    )
    assert job.device.memory_bandwidth == 12e9
    assert job.device.name == "cpu"
    assert not remark and not others
    with pytest.raises(ValueError, match="`measure` must be alone"):
        advise.cases(
            flags_of(**RESNET, **TEN_GIGABIT, measure=True, device="t4")
        )


def test_several_workers_need_a_network():
    with pytest.raises(
        ValueError, match="`latency` must be given .* --latency=50us"
    ):
        advise.cases(flags_of(**RESNET, bandwidth="10Gbit"))


@pytest.mark.parametrize("name", TEN_GIGABIT)
def test_a_single_worker_has_no_network(name):
    one = {**RESNET, "workers": 1, "devices": 8, name: TEN_GIGABIT[name]}
    with pytest.raises(
        ValueError, match=f"`{name}` must be left.*`local_{name}"
    ):
        advise.cases(flags_of(**one))


def test_plot_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    network = network_lib.Network(1e9, 1e-5)
    with pytest.raises(ImportError, match="`--plot` needs matplotlib"):
        figure.save(tmp_path / "a.png", planning_jobs.make_job(), network)


@pytest.mark.parametrize("name", ["missing/advise.png", "advise.picture"])
def test_a_picture_that_cannot_be_written(run, tmp_path, name):
    result = run(**RESNET, **TEN_GIGABIT, device="h100", plot=tmp_path / name)
    assert result.returncode == 1
    assert "`--plot` must be a file that" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("devices_per_worker", [1, 8])
def test_picture_of_many_workers(monkeypatch, tmp_path, devices_per_worker):
    """Owners, which few workers do not have, are in both panels."""
    from matplotlib import pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    job = planning_jobs.make_job(
        workers=64, devices_per_worker=devices_per_worker
    )
    figure.save(tmp_path / "a.png", job, network_lib.Network(1e9, 1e-5))
    monkeypatch.undo()
    [drawn] = figures
    left, right = (axes.get_legend_handles_labels()[1] for axes in drawn.axes)
    legend = [text.get_text() for text in drawn.axes[1].get_legend().texts]
    plt.close(drawn)
    assert "owners" in left and "owners" in right
    assert sorted(legend) == sorted({*left, *right})


def test_docs_show_what_the_command_prints(run):
    docs = (paths.ROOT / "docs" / "advise.md").read_text("utf-8")
    command, shown = re.findall(r"^```(?:sh)?\n(.*?)^```", docs, re.M | re.S)[
        :2
    ]
    readme = (paths.ROOT / "README.md").read_text("utf-8")
    assert command in readme
    args = re.findall(r"--(\w+)=(\S+)", command)
    result = run(**dict(args))
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(shown)


def test_command_refuses_bananas(run):
    result = run(
        parameters="1e5",
        workers=4,
        bandwidth="10 bananas",
        latency="10us",
        step_time="20ms",
    )
    assert result.returncode != 0
    assert (
        "`bandwidth` must be a positive rate such as 10Gbit. Received: 10 "
        "bananas. Units: bit/s" in result.stdout + result.stderr
    )


def test_the_validation_compares_with_measurements(tmp_path):
    """Of times that are the model's own but one, which is twice as long."""
    network = {"bulk_bits_per_second": 1e8, "round_trip_milliseconds": 0.2}
    job = job_lib.Job(
        parameters=10**6,
        workers=3,
        step_seconds=0.02,
        density=0.01,
        device=planning_jobs.cpu(),
    )
    predicted = cost_model.predict(
        job, network_lib.Network(12.5e6, latency=1e-4)
    )
    methods = {
        "local": 0.02,
        "dense": predicted["dense"].step_seconds,
        "sparse:0.01:int32+float32": predicted["sparse"].step_seconds,
        "sparse:0.01:auto": 2 * predicted["coded"].step_seconds,
        "sparse:0.01:auto+natural": predicted["natural"].step_seconds,
        "ddp": 1.0,  # The model does not know it.
    }
    summary = {
        "config": {"num_workers": 3},
        "networks": {"100mbit": network},
        "results": [
            {
                "network": "100mbit",
                "size": 10**6,
                "parameters": 10**6,
                "method": method,
                "milliseconds": 1e3 * seconds,
            }
            for method, seconds in methods.items()
        ],
    }
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary))
    benchmark = "benchmarks.cluster.advise_validation"
    output = subprocess.run(
        [sys.executable, "-m", benchmark, f"--summary={path}"],
        cwd=paths.ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    errors = re.findall(r"([+-]\d+) % \|", output)
    assert [int(error) for error in errors] == [0, 0, -50, 0]
    assert "Median error 0 %, the largest 50 %, of 4 predictions." in output
