"""The compiler and its cache: what decides a build, many processes at once, errors and reports."""

import os
import subprocess
import sys
import textwrap

import pytest

from attnbench.impls.flash_cuda import build
from attnbench.impls.flash_cuda.build import CompileError, Resources

SMALL = 'extern "C" __global__ void small(int* x) { *x = 1; }\n'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(build.OPTIONS_VARIABLE, raising=False)
    return tmp_path / "cache"


def test_a_build_holds_source_code_and_log(cache):
    built = build.build(SMALL)
    assert built.cubin[:4] == b"\x7fELF"
    assert (built.folder / "kernel.cu").read_text() == SMALL
    assert "Used" in built.log
    assert built.resources.problems == []
    assert [path.name for path in cache.iterdir()] == [built.folder.name]


def test_what_decides_the_outcome_decides_the_folder(monkeypatch):
    folders = {build.build(SMALL).folder, build.build(SMALL.replace("1", "2")).folder}
    folders.add(build.build(SMALL, ("-DWATCHDOG",)).folder)
    monkeypatch.setenv(build.OPTIONS_VARIABLE, "-DOTHER")
    folders.add(build.build(SMALL).folder)
    monkeypatch.setattr(build, "_csrc_digest", lambda: "changed")
    folders.add(build.build(SMALL).folder)
    monkeypatch.setattr(build.metadata, "version", lambda package: "13.0.99")
    build._release.cache_clear()
    folders.add(build.build(SMALL).folder)
    monkeypatch.setattr(build, "_version", lambda: (99, 0))
    build._release.cache_clear()
    folders.add(build.build(SMALL).folder)
    build._release.cache_clear()
    assert len(folders) == 7


def test_a_cached_build_compiles_nothing(monkeypatch):
    first = build.build(SMALL)
    monkeypatch.setattr(build, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert build.build(SMALL) == first


def test_an_error_shows_source_and_log_and_leaves_nothing(cache):
    with pytest.raises(CompileError, match=r"(?s)NVRTC.*oops.*undefined"):
        build.build(SMALL.replace("1", "oops"))
    assert list(cache.iterdir()) == []


def test_a_failed_write_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(build, "compile_source", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build.build(SMALL)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "kernel.cubin").unlink(),
        lambda folder: (folder / "kernel.cubin").write_bytes(b""),
        lambda folder: os.truncate(folder / "kernel.cubin", 100),
        lambda folder: (folder / "cubin.sha256").write_text(""),
        lambda folder: (folder / "kernel.log").unlink(),
    ],
    ids=["no code", "empty", "truncated", "no digest", "no log"],
)
def test_a_damaged_entry_is_built_anew(cache, damage):
    whole = build.build(SMALL).cubin
    damage(build.build(SMALL).folder)
    again = build.build(SMALL)
    assert again.cubin == whole
    assert again.resources.problems == []
    assert list(cache.iterdir()) == [again.folder]


def test_an_entry_can_be_read_by_others(cache):
    folder = build.build(SMALL).folder
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("within", ["", "/further"])
def test_an_impossible_cache_is_one_line(tmp_path, monkeypatch, within):
    (tmp_path / "file").touch()
    monkeypatch.setenv(build.CACHE_VARIABLE, f"{tmp_path}/file{within}")
    with pytest.raises(build.CacheError, match=rf"^\$ATTNBENCH_CUDA_CACHE: cannot .*{tmp_path}/file.*$"):
        build.build(SMALL)


def test_processes_build_the_same_kernel_at_once(cache):
    program = textwrap.dedent(
        f"""
        from attnbench.impls.flash_cuda.build import build
        print(len(build({SMALL!r}).cubin))
        """
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    sizes = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(sizes)) == 1
    assert len(list(cache.iterdir())) == 1


def test_the_report_names_what_costs_speed():
    log = (
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register.\n"
        "ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    found = Resources.of_log(log)
    assert found.registers == 168
    stack, stores, loads, warning = found.problems
    assert (stack, stores, loads) == (
        "8 bytes of stack frame",
        "12 bytes of spill stores",
        "16 bytes of spill loads",
    )
    assert "C7508" in warning


def test_the_report_adds_up_all_kernels_of_a_source():
    log = "".join(
        f". {n} bytes stack frame, {n} bytes spill stores, {n} bytes spill loads\ninfo : Used {n} registers\n"
        for n in (8, 0, 4)
    )
    assert Resources.of_log(log) == Resources(8, 12, 12, 12, ())


def test_a_log_without_a_report_is_an_error():
    with pytest.raises(ValueError, match="no ptxas report"):
        Resources.of_log("nothing\n")


def test_an_empty_log_is_not_written_into_bytes_that_python_shares():
    from cuda.bindings import nvrtc

    given = []
    text = build._text(
        nvrtc,
        lambda program: (nvrtc.nvrtcResult.NVRTC_SUCCESS, 1),
        lambda program, buffer: given.append(buffer) or (nvrtc.nvrtcResult.NVRTC_SUCCESS,),
        None,
    )
    assert text == b"\0"
    assert len(given[0]) > 1, "all bytes objects of one byte are one object"
