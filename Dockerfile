# smolforge in a container, on the CPU:
#
#     docker build -t smolforge .
#     docker run --rm -it -v "$PWD:/data" -p 8000:8000 smolforge train --data texts/
#     docker run --rm -it -v "$PWD:/data" -p 8000:8000 -e SMOLFORGE_API_KEY=secret smolforge serve runs/texts --host 0.0.0.0
#
# With CUDA, another index of torch:
#
#     docker build -t smolforge:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#     docker run --rm -it --gpus all -v "$PWD:/data" smolforge:cuda train smollm2-135m --tokens 1B
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The compiler of the native code; the image then needs none when it runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/smolforge
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.10" \
    && pip install --no-cache-dir ".[web,documents]"

# What is compiled while the image is built fits the processor of that machine; set SMOLFORGE_KERNELS=native to compile
# again where the image runs.
RUN useradd --create-home user && mkdir /data && chown user /data
USER user
RUN smolforge build-native
WORKDIR /data
ENTRYPOINT ["smolforge"]
CMD ["--help"]
