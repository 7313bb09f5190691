"""Builds the native modules; everything else is in pyproject.toml.

    WRPO_BUILD=none   pure Python
    WRPO_BUILD=cpu    wrpo_kernels._cpu, or an error that says why not
    WRPO_BUILD=cuda   wrpo_kernels._cpu and wrpo_kernels._cuda, or an error that says why not
    not set           each of them where the compiler or nvcc can build it; one line says which
    WRPO_CUDA_ARCHS   devices to compile for, and PTX of the last one; default 80;90;100;120 where nvcc knows them
    WRPO_SANITIZE     what the compiler's -fsanitize= takes, for wrpo_kernels._cpu (`make sanitize-cpu`)

Torch is neither imported nor linked: one build serves every release of it. ninja runs the compilers, and from its log
of the last build it knows which objects are still good.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

# Once
CPU_SOURCES = [
    "csrc/cpu/bindings.cpp",  # the slowest: first, so that the others compile beside it
    "csrc/cpu/bindings_matrix.cpp",
    "csrc/cpu/huge_pages.cpp",
    "csrc/cpu/preference_loss.cpp",
    "csrc/cpu/sequence_sum.cpp",
    "csrc/cpu/simd.cpp",
]

# Once for each instruction set
LEVEL_SOURCES = [
    "csrc/cpu/product.cpp",
    "csrc/cpu/token_logp.cpp",
    "csrc/cpu/token_statistics.cpp",
    "csrc/cpu/transpose.cpp",
]

CUDA_SOURCES = [
    "csrc/cuda/token_logp.cu",  # the slowest
    "csrc/cuda/token_statistics.cu",
    "csrc/cuda/bindings.cpp",
    "csrc/cuda/preference_loss.cu",
    "csrc/cuda/sequence_sum.cu",
    "csrc/cuda/device.cu",
]
CUDA_ARCHS = ["80", "90", "100", "120"]

# What csrc/cpu/simd.cpp tests before it uses a level must cover its flags.
LEVELS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}

# Without -fno-trapping-math the AVX2 loops do not vectorise. Not -ffast-math: it breaks infinities and NaN.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]

# Lines in the reports, and an end at the first of them.
SANITIZED = ["-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]

# Products are fused only where the source says so, as on the CPU.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-cudart=static", "-Xfatbin=-compress-all", "--threads=0"]

# The depfile that a compiler writes names every header it read.
NINJA_RULE = """\
rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compiling $in into $out
"""


def ninja_path(path: str) -> str:
    return re.sub(r"[$ :]", r"$\g<0>", path)


def say(line: str) -> None:
    print(f"wrpo: {line}", file=sys.stderr)


def wanted() -> str:
    """What WRPO_BUILD asks for: "none", "cpu", "cuda" or "auto"."""
    choice = os.environ.get("WRPO_BUILD", "auto")
    if choice not in ("none", "cpu", "cuda", "auto"):
        raise SystemExit(f"wrpo: WRPO_BUILD: expected none, cpu or cuda, got {choice!r}")
    return choice


class Unit(NamedTuple):
    """One call of a compiler: one source can give several objects."""

    source: str
    object: str  # its file, in the folder of its extension
    compiler: Sequence[str]  # with every flag


class Nvcc:
    """An nvcc with its toolkit, and what it compiles for.

    Raises OSError where there is none: a compiler driver without a toolkit behind it does not count.
    """

    def __init__(self) -> None:
        self.path, self.toolkit = self.find()
        known = set(re.findall(r"sm_(\w+)", self.output("--list-gpu-code")))
        asked = re.findall(r"[^;,\s]+", os.environ.get("WRPO_CUDA_ARCHS", ""))
        self.archs = asked or [arch for arch in CUDA_ARCHS if arch in known]
        if not set(self.archs) <= known:
            raise SystemExit(f"wrpo: WRPO_CUDA_ARCHS: {self.path} knows {sorted(known)}, got {self.archs}")

    @staticmethod
    def find() -> tuple[str, Path]:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        named = os.environ.get("CUDACXX")  # one that was named is not replaced by another
        for path in [shutil.which(named)] if named else [shutil.which("nvcc"), f"{home}/bin/nvcc"]:
            if path and os.access(path, os.X_OK):
                plan = subprocess.run([path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
                top = re.search(r"TOP=(.+)", plan.stderr)
                if top:
                    return path, Path(top[1].strip())
        raise OSError(f"{named or 'nvcc'} was not found, or has no toolkit")

    def output(self, *options: str) -> str:
        done = subprocess.run([self.path, *options], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"nvcc failed: {(done.stderr or done.stdout).strip()[-400:]}")
        return done.stdout

    def compiler(self) -> list[str]:
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        return [self.path, *NVCC_FLAGS, *codes, "-Xcompiler=-fPIC,-fvisibility=hidden"]

    def runtime(self) -> str:
        """The static runtime: nothing of CUDA is needed where the module is loaded, and a driver only to launch."""
        found = sorted(self.toolkit.glob("lib*/libcudart_static.a")) + sorted(
            self.toolkit.glob("targets/*/lib*/libcudart_static.a")
        )
        if not found:
            raise OSError(f"{self.toolkit} has no libcudart_static.a")
        return str(found[0])


class BuildNative(build_ext):
    """Compiles every unit with its own flags by ninja, and links them."""

    def run(self) -> None:
        self.said: list[str] = []
        super().run()
        if self.said:
            say("; ".join(self.said))

    def build_extension(self, ext: Extension) -> None:
        try:
            summary = self.build_cuda(ext) if ext.name.endswith("_cuda") else self.build_cpu(ext)
        except (BaseError, CCompilerError, OSError, ImportError) as error:
            reason = "the compiler failed, see above" if isinstance(error, CCompilerError) else str(error)
            if not ext.optional:
                choice = os.environ.get("WRPO_BUILD")
                raise SystemExit(f"wrpo: WRPO_BUILD={choice}, but {ext.name} could not be built: {reason}") from error
            kind = "no GPU kernels" if ext.name.endswith("_cuda") else "pure Python"
            self.said.append(f"{kind}: {ext.name} could not be built ({reason})")
        else:
            self.said.append(f"built {ext.name}: {summary}")

    def build_cpu(self, ext: Extension) -> str:
        self.link(ext, self.compile(ext, list(self.cpu_units())), self.sanitizer())
        return f"{', '.join(self.levels())}, threads: {'OpenMP' if self.openmp() else 'none'}"

    def build_cuda(self, ext: Extension) -> str:
        nvcc = Nvcc()
        archs = f'-DWRPO_CUDA_ARCHS="{";".join(nvcc.archs)}"'
        units = [
            Unit(source, f"{Path(source).stem}.o", nvcc.compiler() if source.endswith(".cu") else self.cxx(archs))
            for source in CUDA_SOURCES
        ]
        self.link(ext, [*self.compile(ext, units), nvcc.runtime()], ["-ldl", "-lrt", "-lpthread"])
        return f"sm_{', sm_'.join(nvcc.archs)} by {nvcc.path}"

    def cpu_units(self) -> Iterator[Unit]:
        levels = self.levels()
        threads = self.openmp() or (["-fopenmp-simd"] if self.accepts(["-fopenmp-simd"]) else [])
        flags_of_all = [*threads, *self.sanitizer()]
        built = [f"-DWRPO_BUILT_{level.upper()}=1" for level in levels]
        for source in CPU_SOURCES:
            yield Unit(source, f"{Path(source).stem}.o", self.cxx(*built, *flags_of_all))
        for source in LEVEL_SOURCES:
            for level, flags in levels.items():
                compiler = self.cxx(f"-DWRPO_LEVEL={level}", *flags_of_all, *flags)
                yield Unit(source, f"{Path(source).stem}.{level}.o", compiler)

    def cxx(self, *flags: str) -> list[str]:
        """The C++ compiler that setuptools found, with the flags of every unit and these."""
        import pybind11

        folders = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        return [*self.compiler.compiler_so_cxx, *(f"-I{folder}" for folder in folders), *FLAGS, *flags]

    def compile(self, ext: Extension, units: list[Unit]) -> list[str]:
        """The objects of all units, in parallel; those that are newer than all they were made from stay."""
        import ninja

        folder = Path(self.build_temp, ext.name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / unit.object) for unit in units]
        lines = [NINJA_RULE]
        for unit, name in zip(units, objects, strict=True):
            source, command = os.path.abspath(unit.source), shlex.join(unit.compiler).replace("$", "$$")
            lines.append(f"build {ninja_path(name)}: compile {ninja_path(source)}\n  compiler = {command}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder)]
        command += ["-j", str(self.parallel)] if self.parallel else []
        if subprocess.run(command if self.verbose else [*command, "--quiet"], stdout=sys.stderr).returncode:
            raise CompileError("ninja stopped at the errors above")
        return objects

    def link(self, ext: Extension, objects: list[str], libraries: Sequence[str] = ()) -> None:
        # OpenMP is not linked: the GOMP_* symbols bind to the libgomp that torch has loaded. A second copy means a
        # second pool of threads on the same cores, and parallel regions up to 500 times slower.
        strip = ["-Wl,-s"] if sys.platform == "linux" and not self.sanitizer() else []
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.compiler.link_shared_object(objects, path, extra_postargs=[*libraries, *strip], target_lang="c++")

    @staticmethod
    def sanitizer() -> list[str]:
        kinds = os.environ.get("WRPO_SANITIZE")
        return [*SANITIZED, f"-fsanitize={kinds}"] if kinds else []

    def levels(self) -> dict[str, list[str]]:
        if platform.machine() not in ("x86_64", "AMD64"):
            return {"generic": []}
        return {level: flags for level, flags in LEVELS.items() if self.accepts(flags)}

    def openmp(self) -> list[str]:
        """The flag for GNU OpenMP, or nothing: another runtime would be one that torch has not loaded."""
        source = "void f(int n, float* x) {\n#pragma omp parallel for\nfor (int i = 0; i < n; ++i) x[i] = 0;\n}"
        return ["-fopenmp"] if b"GOMP_parallel" in self.compiled(source, ("-fopenmp",)) else []

    def accepts(self, flags: list[str]) -> bool:
        return bool(self.compiled("int f() { return 0; }", tuple(flags)))

    def compiled(self, source: str, flags: tuple[str, ...]) -> bytes:
        """The object code of `source`; empty where the compiler refuses. Asked once for each question."""
        known = self.__dict__.setdefault("_compiled", {})
        if (source, flags) not in known:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "probe.cpp")
                path.write_text(source + "\n")
                try:
                    (name,) = self.compiler.compile([str(path)], output_dir=folder, extra_postargs=list(flags))
                    known[source, flags] = Path(name).read_bytes()
                except (CCompilerError, OSError):
                    known[source, flags] = b""
        return known[source, flags]


def extensions() -> list[Extension]:
    choice = wanted()
    if choice == "none":
        say("pure Python, as WRPO_BUILD=none asks")
        return []
    modules = {"_cpu": CPU_SOURCES + LEVEL_SOURCES, "_cuda": CUDA_SOURCES}
    return [
        Extension(f"wrpo_kernels.{name}", sources, language="c++", optional=choice == "auto")
        for name, sources in modules.items()
        if name == "_cpu" or choice != "cpu"
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
