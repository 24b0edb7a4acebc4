# The worker. For a GPU, pip's default torch wheel is the CUDA build, and it brings CUDA's libraries with it: the host
# needs NVIDIA's driver and container toolkit only. Without a GPU, TORCH_INDEX_URL takes the index with PyTorch's CPU
# wheels, which are much smaller (a +cpu version is newer to pip than the same without).
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

ARG TORCH_INDEX_URL=""
# `callbacks` makes the callbacks worker's image: small, without torch.
ARG EXTRA=worker

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    # The root file system may be read-only: what libraries keep goes here.
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton

RUN useradd --create-home --uid 10001 worker \
    && install --directory --owner worker --group worker /cache

WORKDIR /app

# torch first, in a layer of its own: it is large and seldom changes.
COPY constraints.txt ./
RUN [ "$EXTRA" != worker ] \
    || pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch

COPY pyproject.toml README.md LICENSE ./
COPY tasks ./tasks
RUN pip install --constraint constraints.txt ".[$EXTRA]"

# The worker runs from here; only its client, `tasks`, is installed.
COPY config ./config
COPY worker ./worker

USER worker

CMD ["celery", "-A", "worker.app", "worker"]
