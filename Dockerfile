# megatron_ee on a CUDA machine.
#
#   docker build -t megatron-ee .
#   docker build -t megatron-ee --build-arg APEX=1 .
#   docker run --gpus all --ipc host -v /models:/models -v "$PWD":/work megatron-ee tune --config run.yaml --output out
#   docker build --target serve -t megatron-ee-serve .      # the server alone: docs/serving.md
#
# The CUDA releases of the base image and of TORCH's build belong together.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE_IMAGE} AS base

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN pip install --index-url ${TORCH_INDEX} ${TORCH}

# NVIDIA's apex, which is not the package of that name on PyPI, is built against the torch above for the architectures
# named here: Ampere, Ada, Hopper and Blackwell (10.0: B200, 12.0: RTX). That takes a while: off by default.
ARG APEX=0
# master of 8 July 2026
ARG APEX_REF=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG CUDA_ARCHITECTURES="8.0;8.6;8.9;9.0;10.0;12.0"
ENV TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES}
RUN if [ "${APEX}" = 1 ]; then \
        pip install setuptools wheel packaging ninja \
        && git clone https://github.com/NVIDIA/apex /tmp/apex \
        && git -C /tmp/apex checkout "${APEX_REF}" \
        && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation /tmp/apex \
        && rm -rf /tmp/apex; \
    fi

COPY . /opt/megatron_ee
RUN pip install /opt/megatron_ee

WORKDIR /work

# The server. It needs no rights: docker run --user "$(id -u):$(id -g)" lets it read a key file of mode 0600 and write logs.
FROM base AS serve
RUN pip install "/opt/megatron_ee[serve]"
USER 10001:10001
ENV HF_HUB_OFFLINE=1 HOME=/tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["megatron-ee", "serve"]
CMD ["--help"]

# Everything. A build without --target makes this one.
FROM base AS all
ENTRYPOINT ["megatron-ee"]
CMD ["--help"]
