# mygpt for CPUs, with the server. Your folder is /work in the container:
#
#   docker build --tag mygpt .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" mygpt train poems.txt --minutes 5
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" --publish 127.0.0.1:8000:8000 \
#       mygpt serve runs/poems --host 0.0.0.0
#
# The tests do not build this image.

FROM python:3.11-slim-bookworm AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.11-slim-bookworm
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]"
RUN useradd --no-create-home mygpt && mkdir /work && chown mygpt /work
# Machine code is compiled at first use, for the processor that runs it. A volume here keeps it.
ENV MYGPT_CACHE=/tmp/mygpt
USER mygpt
WORKDIR /work
ENTRYPOINT ["mygpt"]
