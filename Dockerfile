# mygpt for CPUs, with the server. Your folder is /data in the container:
#
#   docker build --tag mygpt .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" mygpt train poems.txt --minutes 5
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" --publish 127.0.0.1:8000:8000 \
#       mygpt serve runs/poems --host 0.0.0.0
#
# The tests do not build this image.

FROM python:3.11-slim-bookworm AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim-bookworm
# With CUDA's libraries unless an index of CPU builds is named: --build-arg TORCH="--index-url ... torch"
ARG TORCH=torch
RUN pip install --no-cache-dir $TORCH
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]"
RUN useradd --no-create-home mygpt && mkdir /data && chown mygpt /data
# Machine code is compiled at first use, for the processor that runs it. A volume here keeps it.
ENV MYGPT_CACHE=/tmp/mygpt
USER mygpt
WORKDIR /data
ENTRYPOINT ["mygpt"]
