# Every program for CPUs, in an image that holds them, their libraries and nothing else:
#   docker build -f deploy/images/cpu.Dockerfile -t headwater-cpu:0.1.0 .
FROM debian:bookworm-20251117-slim AS build
WORKDIR /src
COPY tools/packages.txt tools/deps.sh tools/
RUN bash tools/deps.sh --build && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cmake --preset release -DHW_CUDA=OFF -DBUILD_TESTING=OFF
# replay: compile
RUN cmake --build --preset release --target headwater-coordinator headwater-worker headwater-decode headwater
RUN bash deploy/images/collect.sh --loader /image build/release/bin \
    && install -d -m 1777 /image/tmp

FROM scratch
COPY --from=build /image/ /
ENV PATH=/opt/headwater/bin LD_LIBRARY_PATH=/opt/headwater/lib
USER 65532:65532
