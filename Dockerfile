# megatron_ee on a CUDA machine.
#
#   docker build -t megatron-ee .
#   docker build -t megatron-ee --build-arg TRANSFORMER_ENGINE=1 --build-arg APEX=1 .
#   docker run --gpus all --ipc host -v /models:/models -v "$PWD":/work megatron-ee tune --config run.yaml --output out
#
# The CUDA release of the base image, of TORCH's build and of TE_EXTRA belong together.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/venv

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN pip install --index-url ${TORCH_INDEX} ${TORCH}

# Both are built against the torch above, for the architectures named here, and take a while: off by default.
ARG TRANSFORMER_ENGINE=0
ARG TE_EXTRA=core_cu13
ARG APEX=0
ARG APEX_REF=master
ARG CUDA_ARCHITECTURES="8.0;9.0"
ENV TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES}
RUN if [ "${TRANSFORMER_ENGINE}" = 1 ]; then \
        pip install setuptools wheel packaging ninja pybind11 \
        && pip install --no-build-isolation "transformer_engine[pytorch,${TE_EXTRA}]>=2.8,<3"; \
    fi
# NVIDIA's apex is not the package of that name on PyPI.
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
ENTRYPOINT ["megatron-ee"]
CMD ["--help"]
