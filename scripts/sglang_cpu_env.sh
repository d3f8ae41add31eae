#!/usr/bin/env bash
# An environment with a real SGLang that runs on CPUs, for tests and for machines without a GPU.
#
#     scripts/sglang_cpu_env.sh [FOLDER]          default: .venv-sglang; 10 GB, some minutes
#     rosd-fast train --engine.kind sglang --engine.python .venv-sglang/bin/python
#
# It is of its own because SGLang pins torch and transformers. Its kernel library wants one symbol of
# the CUDA driver, which a stub provides; a .pth file loads the stub in every Python process, so that
# no variable has to be set.
set -euo pipefail

folder=${1:-.venv-sglang}
version=0.5.23
python=${PYTHON:-$(command -v python3.11 || command -v python3)}

if [ -e "$folder/.ready-$version" ]; then
    echo "$folder is ready"
    exit 0
fi
command -v gcc >/dev/null || { echo "gcc is missing: the stub of the CUDA driver is compiled" >&2; exit 2; }
[ -x "$folder/bin/pip" ] || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "sglang==$version"

packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! ldconfig -p | grep -q 'libcuda\.so\.1'; then
    echo 'int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 100; }' |
        gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -x c -o "$packages/libcuda_stub.so" -
    echo "import ctypes; ctypes.CDLL('$packages/libcuda_stub.so', mode=ctypes.RTLD_GLOBAL)" > "$packages/libcuda_stub.pth"
fi
"$folder/bin/python" -c 'import sglang, sgl_kernel' 2>/dev/null || {
    echo "$folder: sglang cannot be imported:" >&2
    "$folder/bin/python" -c 'import sglang, sgl_kernel'
}
touch "$folder/.ready-$version"
echo "$folder is ready"
