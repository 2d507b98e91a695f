# The daemon, its one package, and nothing else. Runs as it is with a read-only root file system:
#   docker build -t shared-lock .
#   docker run --read-only --cap-drop ALL -p 8080:8080 \
#     -e SHARED_LOCK_ETCD_ADDR_LIST=http://etcd:2379 shared-lock
#
# Renewing the pins: the newest tag python:3.14.N-slim-trixie goes into FROM and base.name; what
#   docker run --rm python:3.14-slim-trixie pip install --dry-run etcd3gw
# "would install" goes into RUN, without setuptools.
FROM python:3.14.10-slim-trixie

# etcd3gw, and under it what it cannot be imported without. pbr's setuptools is for building
# packages and stays away, hence --no-deps: what is not listed here is not installed.
RUN pip install --no-cache-dir --no-compile --no-deps --root-user-action ignore \
        certifi==2026.10.19.post1 \
        charset-normalizer==3.5.2 \
        debtcollector==3.1.0 \
        etcd3gw==2.7.0 \
        futurist==3.5.0 \
        idna==3.20 \
        pbr==7.1.3 \
        requests==2.34.2 \
        urllib3==2.8.0 \
        wrapt==2.5.2 \
    # A number of its own, so that Kubernetes can see that it is not root, and no home to write to.
    && groupadd --system --gid 10001 shared-lock \
    && useradd --system --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir / \
        --shell /usr/sbin/nologin shared-lock

WORKDIR /app
COPY shared_lock.py ./

# Importing compiles what the daemon imports and no more, the standard library included, which the
# base image ships without bytecode; a user who cannot write would compile it at every start. It
# also proves that nothing is missing. The first two are imported only when they are needed.
RUN python -c "import encodings.idna, gzip, etcd3gw, shared_lock"

USER 10001:10001
EXPOSE 8080

# Liveness, as /health is: where the daemon listens, past any http_proxy. -IS leaves out what only
# packages need. With TLS it trusts any certificate; where callers must show one, it has none, and a
# handshake is answer enough.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-ISc", "\
import http.client, os, ssl, sys; \
setting = lambda name: os.environ.get('SHARED_LOCK_SERVER_' + name); \
address = (setting('HOST') or 'localhost', int(setting('PORT') or 8080)); \
plain = http.client.HTTPConnection(*address, timeout=4); \
anybody = ssl._create_unverified_context(); \
secure = http.client.HTTPSConnection(*address, timeout=4, context=anybody); \
connection = secure if setting('CERT_PATH') else plain; \
connection.connect(); \
setting('CLIENT_CA_PATH') and sys.exit(); \
connection.request('GET', '/health'); \
sys.exit(connection.getresponse().status != 200)"]

# As PID 1, so that SIGTERM reaches it. -m and not the file's name: only modules are read from
# bytecode.
ENTRYPOINT ["python", "-m", "shared_lock"]
CMD ["serve"]

# Last, since they change with every build:
#   --build-arg VERSION=$(python3 shared_lock.py --version | awk '{print $NF}') \
#   --build-arg REVISION=$(git rev-parse HEAD)
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="shared-lock" \
      org.opencontainers.image.description="Distributed locks over HTTP, kept in etcd" \
      org.opencontainers.image.base.name="docker.io/library/python:3.14.10-slim-trixie" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
