"""The emulation in which the CUDA kernels are tested: it computes as CUDA does, and finds what it should."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = r"""
#include "csrc/common/cuda/device.h"
#include <cstdio>
#include <vector>
using namespace star;

__global__ void sums(const float* in, float* out, int count) {
  __shared__ float scratch[warp_size];
  float value = 0.0f;
  for (int i = threadIdx.x; i < count; i += blockDim.x) value += in[i];
  const float total = block_sum(value, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = total + blockIdx.x;
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  if (lane >= 20) return;  // a warp whose last lanes are gone
  out[lane] = __shfl_up_sync(all_lanes, lane, 3) + 100 * __shfl_down_sync(all_lanes, lane, 1) +
              10000 * __shfl_xor_sync(all_lanes, lane, 1, 8) + 1000000 * __shfl_sync(all_lanes, lane, 2);
}

__global__ void neighbours(int* out, bool with_barrier) {
  STAR_SHARED_AT_LAUNCH(int, values);
  values[threadIdx.x] = threadIdx.x;
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

__global__ void different_barriers() {
  if (threadIdx.x < 32) __syncthreads();
  else __shfl_sync(all_lanes, 0, 0);
  if (threadIdx.x == 40) __syncthreads();
  __shfl_sync(all_lanes, 0, 0);
}

int main() {
  std::vector<float> in(1000, 0.5f), out(3);
  emulator::run(3, 96, 0, [&] { sums(in.data(), out.data(), 1000); });
  std::printf("%g %g %g\n", out[0], out[1], out[2]);
  std::vector<int> lanes(32, -1);
  emulator::run(1, 32, 0, [&] { shuffles(lanes.data()); });
  std::printf("%d %d %d\n", lanes[0], lanes[5], lanes[19]);
  for (bool with_barrier : {true, false}) {
    std::vector<int> next(64);
    emulator::run(1, 64, 64 * sizeof(int), [&] { neighbours(next.data(), with_barrier); });
    int right = 0;
    for (int i = 0; i < 64; ++i) right += next[i] == (i + 1) % 64;
    std::printf("%d\n", right);
  }
  try {
    emulator::run(1, 64, 0, [&] { different_barriers(); });
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-w", "-DSTAR_EMULATE_CUDA", f"-I{ROOT}"]
    subprocess.run([compiler, *flags, "program.cpp", "-o", "program"], cwd=folder, check=True)
    return folder / "program"


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_threads_barriers_and_shuffles(program: Path, order: str) -> None:
    environment = {**os.environ, "STAR_EMULATED_ORDER": order}
    lines = subprocess.run([program], env=environment, check=True, capture_output=True, text=True).stdout
    sums, lanes, with_barrier, without, barriers = lines.splitlines()
    assert sums == "500 501 502"
    # lane 0: up stays 0, down 1, xor within 8 lanes 1, lane 2; lane 19's lower neighbour has returned
    assert lanes.split() == ["2010100", "2040602", f"{2_000_000 + 18 * 10_000 + 19 * 100 + 16}"]
    assert with_barrier == "64"
    assert int(without) < 64, "a missing barrier went unseen"
    assert barriers == "threads of a block wait at different barriers"
