# marlinctl in a container, with the versions of constraints.txt.
#
#   docker build -t marlinctl .                       CPU
#   docker build -t marlinctl:cuda --target cuda .    NVIDIA GPUs of compute capability 8.0 or later; runs with the NVIDIA Container Toolkit
#
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v marlinctl-cache:/cache marlinctl compress MODEL OUT
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" -v marlinctl-cache:/cache marlinctl:cuda bench
#
# Neither has a compiler or a CUDA toolkit: CUDA builds of torch bring NVRTC, which compiles the kernels at first use.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY marlinctl ./marlinctl
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
# /cache holds what is downloaded and compiled, for whichever user `docker run --user` names; torch asks for that user's name.
ENV HF_HOME=/cache/huggingface MARLINCTL_CACHE=/cache/marlinctl HOME=/cache USER=marlinctl
RUN mkdir -m 1777 /cache /work
WORKDIR /work
COPY constraints.txt /
# Below, doctor gets another cache: what root makes in /cache, the user could not write.
ENTRYPOINT ["marlinctl"]
CMD ["--help"]

FROM base AS cuda
# What the toolkit hands in; images of NVIDIA set the same.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir -c /constraints.txt torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /constraints.txt "$(echo /wheels/*.whl)[eval]" && \
    MARLINCTL_CACHE="$(mktemp -d)" marlinctl doctor --quick
USER 1000:1000

FROM base AS cpu
RUN pip install --no-cache-dir -c /constraints.txt --index-url https://download.pytorch.org/whl/cpu torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /constraints.txt "$(echo /wheels/*.whl)[eval]" && \
    MARLINCTL_CACHE="$(mktemp -d)" marlinctl doctor --quick
USER 1000:1000
