"""CUDA without a GPU: a device guard and hooks that do nothing, so that autograd accepts fake CUDA tensors.

torch's FakeTensorMode alone makes CUDA tensors without memory, but autograd asks the device guard of CUDA for
streams, and the hooks for whether there is a device. A torch built for CPUs has no guard ("PyTorch is not
linked with support for cuda devices"), and one built for CUDA has a guard that fails without a GPU. The
library below replaces both. torch reads the hooks once, so the library must be loaded before torch is
imported: this module imports neither torch nor anything that does.

`load` is for a process of its own, such as `python -m svd_ds.plan.profile`: real CUDA is unusable there.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

// With cuDNN, because convolutions then choose cuDNN's layout of results.
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 91300; }
  long versionRuntimeCuDNN() const override { return 91300; }
  long versionCuDNNFrontend() const override { return 11400; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

// A torch built with CUDA registers its own hooks when it is imported, and keeps those of higher priority.
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_TYPED_CREATOR_WITH_PRIORITY(
    CUDAHooksRegistry, std::string("CUDAHooks"), c10::REGISTRY_PREFERRED,
    RegistererCUDAHooksRegistry::DefaultCreator<Hooks>);
}  // namespace

// The last registered guard is used: a torch built with CUDA registers its own when it is imported.
extern "C" void svd_ds_register_guard() {
  c10::impl::DeviceGuardImplRegistrar(DeviceType::CUDA, new Guard());
}
"""
COMPILERS = ("g++", "c++", "clang++")


class NoCompilerError(RuntimeError):
    """There is no C++ compiler, it cannot compile against torch's headers, or the cache cannot be written."""


def load() -> None:
    """Load the library and import torch. The process must not have imported torch before.

    Raises:
        NoCompilerError: the library cannot be built.
    """
    assert "torch" not in sys.modules, "torch has read its CUDA hooks already"
    torch_folder = _torch_folder()
    try:
        built = _build(torch_folder)
    except OSError as error:
        raise NoCompilerError(f"{cache_folder()} cannot be written: {error}") from error
    # Even on a machine with GPUs nothing may be started on one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    library.svd_ds_register_guard()


def leave() -> NoReturn:
    """End a process that has called `load`, successfully.

    A torch built with CUDA aborts if its own destructors run: its threads were started with this library.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def cache_folder() -> Path:
    """Return the user's folder for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svd_ds"


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _build(torch_folder: Path) -> Path:
    """Compile the library, unless the cache has it, and return its path."""
    version = (torch_folder / "version.py").read_text()
    tag = hashlib.sha256(f"{SOURCE}{version}{torch_folder}".encode()).hexdigest()[:16]
    built = cache_folder() / f"fake-cuda-{tag}.so"
    if built.exists():
        return built
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoCompilerError(f"there is no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH")
    built.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may build at the same time: each writes its own file, and the last one stays.
    draft = built.with_suffix(f".{os.getpid()}")
    options = ["-std=c++20", "-O0", "-shared", "-fPIC", "-x", "c++", "-"]
    paths = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(
        [compiler, *options, "-o", str(draft), *paths], input=SOURCE, capture_output=True, text=True
    )
    if done.returncode:
        draft.unlink(missing_ok=True)
        raise NoCompilerError(f"{compiler} cannot compile against torch's headers: {done.stderr[-2000:]}")
    os.replace(draft, built)
    return built
