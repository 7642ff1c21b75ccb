# An agent's image with the sidecar inside: docker build -f deploy/docker/agent.Dockerfile -t agent:1.0.0 deploy/docker
ARG SIDECAR=agent-sidecar:0.1.0
FROM ${SIDECAR} AS sidecar

FROM python:3.13-slim-bookworm
# The two lines. The second stands where the CLI is installed: a file that moves in a later layer is stored twice, and the CLI has 380 MB.
COPY --from=sidecar /agent-sidecar /usr/local/bin/agent-sidecar
RUN pip install --no-cache-dir claude-agent-sdk==0.2.187 && agent-sidecar install --all
# Its home, where the CLI keeps sessions and settings, and what it shares with a sidecar beside it.
RUN mkdir -p -m 700 /home/agent /run/agent-sidecar /var/lib/agent-sidecar \
    && chown 10001:10001 /home/agent /run/agent-sidecar /var/lib/agent-sidecar
COPY app.py /app/app.py
# With a read-only root these stay writable, whoever starts it.
VOLUME ["/home/agent", "/run/agent-sidecar", "/var/lib/agent-sidecar"]
ENV HOME=/home/agent PYTHONUNBUFFERED=1
WORKDIR /home/agent
USER 10001:10001
EXPOSE 8080 9477
ENTRYPOINT ["python3", "/app/app.py"]
