# Every program for Hopper GPUs. NVIDIA's container toolkit adds the driver's libraries, and needs ldconfig for that: therefore a base.
#   docker build -f deploy/images/cuda.Dockerfile -t headwater-cuda:0.1.0 .
FROM debian:bookworm-20251117-slim AS build
WORKDIR /src
COPY tools/packages.txt tools/deps.sh tools/
RUN bash tools/deps.sh --build && rm -rf /var/lib/apt/lists/*
# CUDA and NCCL as PyPI has them, in the layout that CMake looks for; and a CMake that knows CUDA 13, where Debian's 3.25.1 looks for
# libnvToolsExt, which is no more.
COPY deploy/images/cuda-requirements.txt deploy/images/
RUN python3 -m venv /cuda/venv \
    && /cuda/venv/bin/pip install --no-cache-dir cmake==3.31.6 \
    && /cuda/venv/bin/pip install --no-cache-dir --no-deps --target /cuda/wheels -r deploy/images/cuda-requirements.txt \
    && mv /cuda/wheels/nvidia/cu13 /usr/local/cuda \
    && cp -a /cuda/wheels/nvidia/nccl/include/. /usr/local/cuda/include/ \
    && cp -a /cuda/wheels/nvidia/nccl/lib/libnccl.so.2 /usr/local/cuda/lib/ \
    && ln -s lib /usr/local/cuda/lib64 \
    && ln -s libcudart.so.13 /usr/local/cuda/lib/libcudart.so \
    && ln -s libcublasLt.so.13 /usr/local/cuda/lib/libcublasLt.so \
    && ln -s libnccl.so.2 /usr/local/cuda/lib/libnccl.so
ENV PATH=/cuda/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin
COPY . .
RUN CUDACXX=/usr/local/cuda/bin/nvcc cmake --preset release -DHW_CUDA=ON -DBUILD_TESTING=OFF
# replay: compile
RUN cmake --build --preset release --target headwater-coordinator headwater-worker headwater-decode headwater
# cuBLASLt is opened by name.
RUN LD_LIBRARY_PATH=/usr/local/cuda/lib bash deploy/images/collect.sh /image build/release/bin \
    /usr/local/cuda/lib/libcublasLt.so.13

FROM debian:bookworm-20251117-slim
# The adapters' part of libibverbs, which NCCL opens by name. Debian 12 removes superseded versions, so that none is pinned.
# hadolint ignore=DL3008
RUN apt-get update -q && apt-get install -q -y --no-install-recommends ibverbs-providers && rm -rf /var/lib/apt/lists/*
COPY --from=build /image/ /
ENV PATH=/opt/headwater/bin:/usr/sbin:/usr/bin:/sbin:/bin LD_LIBRARY_PATH=/opt/headwater/lib
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
