# Two images: the server, and the reader of an exported model, which has no torch.
#
#   docker build --target server -t fastbert-server .
#   docker run --rm -p 127.0.0.1:8000:8000 --shm-size 1g -v "$PWD/my-model:/model:ro" fastbert-server --model /model
#
#   docker build --target reader -t fastbert-reader .
#   docker run --rm -i -v "$PWD/outputs/onnx:/model:ro" fastbert-reader --speed 0.5 < texts.txt
#
# PyTorch's builds for CPUs alone make the server's image several gigabytes smaller: name the index that has them with
# --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Nobody in particular, with a folder for what is downloaded.
RUN useradd --uid 10001 --create-home --home-dir /home/fastbert fastbert
WORKDIR /home/fastbert


FROM base AS reader
COPY constraints.txt /tmp/constraints.txt
RUN pip install -c /tmp/constraints.txt numpy onnxruntime tokenizers
COPY fastbert_hf/engines/fastbert_reader.py ./
USER fastbert
# It reads lines, answers and ends: what can be asked of it is whether its libraries and the model are there.
HEALTHCHECK --interval=60s --timeout=20s CMD echo fine | python fastbert_reader.py --folder /model || exit 1
ENTRYPOINT ["python", "fastbert_reader.py", "--folder", "/model"]


FROM base AS builder
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/venv
WORKDIR /source
COPY constraints.txt pyproject.toml setup.cfg README.md LICENSE fastbert_hf_cli.py ./
COPY fastbert_hf fastbert_hf
RUN /opt/venv/bin/pip install -c constraints.txt ".[ray]"


FROM base AS server
COPY --from=builder /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/home/fastbert/cache RAY_USAGE_STATS_ENABLED=0
USER fastbert
EXPOSE 8000
# Loading a model takes a while; after that a server that does not answer is not healthy.
HEALTHCHECK --start-period=120s --interval=10s --timeout=5s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# It answers what waits before it ends.
STOPSIGNAL SIGTERM
# Inside of a container every address is its own: -p says who may reach it, and FASTBERT_API_KEY who is answered.
ENTRYPOINT ["fastbert-hf", "serve", "--host", "0.0.0.0", "--port", "8000"]
