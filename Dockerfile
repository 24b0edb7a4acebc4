# The worker's image. For a GPU, pip's default torch wheel is the CUDA build and contains CUDA's libraries: the host
# only needs NVIDIA's driver and container toolkit. Without a GPU, set TORCH_INDEX_URL to the index with PyTorch's CPU
# wheels, which are much smaller (pip takes a +cpu version as newer than the same version without it).
ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

ARG TORCH_INDEX_URL=""
# `callbacks` makes the callbacks worker's image, `flower` that of Flower: small, without torch.
ARG EXTRA=worker
# Further extras, with commas between them: `otel` for traces, `sentry`.
ARG WITH=""

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    # The root file system may be read-only: libraries keep their caches here.
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton

RUN useradd --create-home --uid 10001 worker \
    && install --directory --owner worker --group worker /cache

WORKDIR /app

# torch first, in a layer of its own, since it is large and rarely changes.
COPY constraints.txt ./
RUN [ "$EXTRA" != worker ] \
    || pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch

COPY pyproject.toml README.md LICENSE idefics_jobs_celery.py ./
COPY tasks ./tasks
RUN pip install --constraint constraints.txt ".[$EXTRA${WITH:+,$WITH}]"

# The worker runs from this folder; only the client, `tasks`, is installed.
COPY config ./config
COPY worker ./worker

USER worker

CMD ["celery", "-A", "worker.app", "worker"]
