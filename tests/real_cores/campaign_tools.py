"""The campaign's programs: servers with a client of their own, and tools with work for long. Data."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.real_cores.campaign_languages import Prepare, script
from tests.real_cores.real_programs import tool
from tests.real_cores.workers import Worker

SECONDS = 2.0
"""What a client waits for an answer."""


def _files(package: str, files: dict[str, str], *command: str) -> Prepare:
    """Files, some of them in folders, beside a command; `@` in both stands for the folder."""

    def prepare(directory: Path) -> Sequence[str]:
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(content.replace("@", str(directory)))
        return [tool(command[0], package), *(word.replace("@", str(directory)) for word in command[1:])]

    return prepare


def _free_port(directory: Path) -> int:
    """A port of this folder's own."""
    return 20000 + hash_of(str(directory)) % 20000


def hash_of(text: str) -> int:
    return int.from_bytes(text.encode(), "little") % 1000003


def _with_port(prepare: Prepare) -> Prepare:
    """`PORT` in files and command is a port of the folder's own."""

    def prepared(directory: Path) -> Sequence[str]:
        command = prepare(directory)
        port = str(_free_port(directory))
        for path in directory.iterdir():
            if path.is_file() and "PORT" in (text := path.read_text(errors="surrogateescape")):
                path.write_text(text.replace("PORT", port), errors="surrogateescape")
        return [word.replace("PORT", port) for word in command]

    return prepared


# ------------------------------------------------------------------------------------ clients


def _http(directory: Path) -> None:
    for number in range(20):
        with socket.create_connection(("127.0.0.1", _free_port(directory)), SECONDS) as connection:
            connection.settimeout(SECONDS)
            for _ in range(4):
                path = f"/{'x' * (number * 37 % 400)}?a={number}" if number % 3 else "/index.html"
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h{number}\r\nAccept-Encoding: gzip\r\n\r\n".encode())
                if not connection.recv(65536):
                    break


def _dns(directory: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.settimeout(0.05)
        connection.connect(("127.0.0.1", _free_port(directory)))
        for number in range(200):
            name = f"h{random.randrange(3000)}"
            labels = b"".join(bytes([len(part)]) + part for part in (name.encode(), b"example", b"test")) + b"\0"
            kind = (1, 28, 16, 15, 255)[number % 5]
            connection.send(struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">HH", kind, 1))
            if number % 20 == 0:
                connection.recv(4096)


def _memcached(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS)
        connection.connect(os.path.relpath(directory / "socket"))
        for number in range(300):
            value = "v" * random.randrange(9000)
            key = f"k{random.randrange(2000)}"
            connection.sendall(
                f"set {key} 0 0 {len(value)}\r\n{value}\r\nget k{number} k{number * 7} {key}\r\n".encode()
            )
            connection.recv(65536)


# ------------------------------------------------------------------------------- what they work on

APACHE = """
ServerRoot @
ServerName test
Listen 127.0.0.1:PORT
PidFile @/pid
ErrorLog @/error.log
DefaultRuntimeDir @
ThreadsPerChild 8
MaxRequestWorkers 8
ServerLimit 1
StartServers 1
MinSpareThreads 1
MaxSpareThreads 8
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule deflate_module /usr/lib/apache2/modules/mod_deflate.so
LoadModule filter_module /usr/lib/apache2/modules/mod_filter.so
LoadModule rewrite_module /usr/lib/apache2/modules/mod_rewrite.so
LoadModule include_module /usr/lib/apache2/modules/mod_include.so
DocumentRoot @/www
SetOutputFilter INCLUDES;DEFLATE
RewriteEngine on
RewriteRule ^/(x+)$ /index.html?$1
"""
LIGHTTPD = """
server.document-root = "@/www"
server.port = PORT
server.bind = "127.0.0.1"
server.modules = ("mod_rewrite", "mod_deflate", "mod_status", "mod_setenv")
url.rewrite-once = ("^/(x+)" => "/index.html?$1")
setenv.add-response-header = ("X-One" => "two")
deflate.mimetypes = ("text/html")
mimetype.assign = (".html" => "text/html")
status.status-url = "/status"
"""
HAPROXY = """
global
  maxconn 100
  stats socket @/stats level admin
defaults
  mode http
  timeout client 2s
  timeout server 2s
  timeout connect 1s
frontend f
  bind 127.0.0.1:PORT
  compression algo gzip
  http-request set-header X-A %[path,lower,sha1,hex]
  acl long path_len gt 100
  http-request return status 200 content-type text/plain lf-string "%[path] %[req.hdr(host)]" if long
  default_backend b
backend b
  stick-table type string size 5k expire 5s store http_req_rate(10s)
  http-request track-sc0 path
  server s unix@/none
"""
SQUID = """
http_port 127.0.0.1:PORT
pid_filename @/pid
cache_log @/cache.log
access_log none
coredump_dir @
cache_mem 8 MB
max_filedescriptors 256
http_access allow all
pinger_enable off
acl long url_regex xxxx
http_access deny long
"""
UNBOUND = """
server:
  interface: 127.0.0.1
  port: PORT
  do-daemonize: no
  use-syslog: no
  username: ""
  chroot: ""
  directory: "@"
  pidfile: ""
  num-threads: 2
  msg-cache-size: 100k
  rrset-cache-size: 200k
  local-zone: "test." static
""" + "".join(f'  local-data: "h{n}.example.test. IN A 10.0.{n // 250}.{n % 250}"\n' for n in range(2000))  # fmt: skip
SLAPD = """
include /etc/ldap/schema/core.schema
modulepath /usr/lib/ldap
moduleload back_mdb
database mdb
maxsize 200000000
suffix "dc=t"
directory @/db
index cn,sn eq,sub
"""
LDIF = "dn: dc=t\nobjectClass: organization\nobjectClass: dcObject\no: t\ndc: t\n\n" + "".join(
    f"dn: cn=p{n},dc=t\nobjectClass: person\ncn: p{n}\nsn: {'s' * (n % 60 + 1)}{n}\ndescription: {n * 7919}\n\n" for n in range(60000)
)  # fmt: skip
SAMBA = "[global]\nworkgroup = W\n" + "".join(
    f"[s{n}]\npath = /tmp/{n}\ncomment = {'c' * (n % 90)}\nvalid users = u{n}, @g{n % 70}\nveto files = /*.a{n}/*.b/\n" for n in range(20000)
)  # fmt: skip
DUMP_HEAD = "SVN-fs-dump-format-version: 2\n\n"
MARIADB = (
    "create database if not exists d;\nuse d;\n"
    "create table if not exists t (id int primary key auto_increment, name varchar(900), n int, key (n)) engine=innodb;\n"
    "insert into t (name, n) select repeat(char(65 + seq % 26), seq % 800), seq * 7919 % 1013 from (with recursive c (seq) as "
    "(select 1 union all select seq + 1 from c where seq < 500) select seq from c) s;\n"
    "select count(*), group_concat(name order by n) from t group by n % 40;\nselect json_arrayagg(n) from t where n < 50;\n"
    "delete from t where n % 3 = 1;\nupdate t set name = concat(name, n) where n % 7 = 2;\n"
)  # fmt: skip
GRAPH = (
    "digraph g {\n"
    + "".join(
        f'  n{n} -> n{n * 7919 % 701} [label="e{n}"]; n{n} [shape=record, label="a{n}|{{b|c}}"];\n' for n in range(700)
    )
    + "}\n"
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="900">\n' + "".join(
    f'<g transform="rotate({n % 360})" opacity="0.{n % 9 + 1}"><path d="M{n % 900} 0 C 10 {n % 700} 300 20 {n % 500} 900 Z" fill="#{n * 7919 % 0xFFFFFF:06x}"/>'
    f'<text x="{n % 800}" y="{n * 7 % 800}" font-size="{n % 30 + 5}">text {n}</text></g>\n' for n in range(6000)
) + "</svg>\n"  # fmt: skip
POSTSCRIPT = """
/n 1 def /kept 500 dict def
{ /n n 7919 mul 1 add 100003 mod def
  kept n 400 mod n 90 mod array put kept n 3 mul 400 mod n 900 mod string put
  gsave n 300 mod n 200 mod moveto n 7 mod 20 add /Helvetica findfont exch scalefont setfont (text) show
  n 100 mod 0 moveto 100 n 400 mod 300 20 n 500 mod 600 curveto stroke grestore
  n 20 mod 0 eq { showpage } if } loop
"""
MAKEFILE = "all:" + "".join(f" t{n}" for n in range(20000)) + "\n" + "".join(
    f"V{n} := $(patsubst %.c,%.o,$(foreach x,a b c {n},$(x).c))\nt{n}: t{n // 2}x $(V{n})\n\t@:\n" for n in range(20000)
) + ".PHONY: all\n%.o:\n\t@:\n%x:\n\t@:\n"  # fmt: skip
CMAKE = """
set(kept "")
foreach(n RANGE 1000000)
  math(EXPR k "(${n} * 7919) % 901")
  list(APPEND kept "item ${k}")
  string(REGEX REPLACE "([0-9]+)" "<\\\\1>" text "${kept}")
  set(v${k} "${text}")
  list(LENGTH kept length)
  if(length GREATER 200)
    list(SORT kept)
    set(kept "")
  endif()
endforeach()
"""
TROFF = ".ps 10\n" + "".join(f".de m{n}\nline \\fB{n}\\fP \\$1 of \\s+2text\\s0\n.ds s{n} {'x' * (n % 90)}\n..\n.m{n} word\\*[s{n}]\n.TS\nll.\na{n}\tb\n.TE\n" for n in range(60000))  # fmt: skip
TEXT = "".join(
    f"{n * n * 31} is a number, {n * 7919 % 1013} is another {chr(97 + n % 26) * (n % 40)}\n" for n in range(4000)
)


def _pdf(package: str, *command: str) -> Prepare:
    """A document of 400 pages, without its table of places: readers make it anew."""

    def prepare(directory: Path) -> Sequence[str]:
        parts = ["%PDF-1.4\n1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj\n"]
        pages = range(400)
        kids = " ".join(f"{10 + 2 * page} 0 R" for page in pages)
        parts.append(f"2 0 obj <</Type /Pages /Kids [{kids}] /Count 400>> endobj\n")
        parts.append("3 0 obj <</Type /Font /Subtype /Type1 /BaseFont /Helvetica>> endobj\n")
        for page in pages:
            lines = "".join(
                f"0 -{9 + page % 3} Td (page {page} line {line} {'w' * (line % 30)}) Tj\n" for line in range(90)
            )
            shapes = "".join(f"{n * 7 % 500} {n} m {n} 300 {page} 20 400 {n * 3} c S\n" for n in range(60))
            stream = f"BT /F 8 Tf 20 800 Td\n{lines}ET\n{shapes}"
            number = 10 + 2 * page
            parts.append(
                f"{number} 0 obj <</Type /Page /Parent 2 0 R /MediaBox [0 0 600 840] /Contents {number + 1} 0 R "
                "/Resources <</Font <</F 3 0 R>>>>>> endobj\n"
                f"{number + 1} 0 obj <</Length {len(stream)}>> stream\n{stream}endstream endobj\n"
            )
        parts.append("trailer <</Root 1 0 R>>\n")
        (directory / "work.pdf").write_text("".join(parts))
        return [tool(command[0], package), *command[1:]]

    return prepare


def _subversion(directory: Path) -> Sequence[str]:
    parts = [DUMP_HEAD]
    for revision in range(1, 4001):
        properties = f"K 7\nsvn:log\nV {len(str(revision)) + 7}\nchange {revision}\nPROPS-END\n"
        size = len(properties)
        parts.append(
            f"Revision-number: {revision}\nProp-content-length: {size}\nContent-length: {size}\n\n{properties}\n"
        )
        text = "".join(f"line {line} of {revision if line % 9 == 0 else line}\n" for line in range(revision % 200 + 5))
        action = "add" if revision <= 50 else "change"
        parts.append(
            f"Node-path: f{revision % 50}\nNode-kind: file\nNode-action: {action}\n"
            f"Text-content-length: {len(text)}\nContent-length: {len(text)}\n\n{text}\n\n"
        )
    (directory / "dump").write_text("".join(parts))
    admin = tool("svnadmin", "subversion")
    # Each end begins with a new repository.
    (directory / "load").write_text(
        f"rm -rf r; {admin} create r && exec {admin} load -q --no-flush-to-disk --file dump r\n"
    )
    return [tool("sh", "dash"), "load"]


def _mercurial(directory: Path) -> Sequence[str]:
    hg = tool("hg", "mercurial")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "HGPLAIN": "1"}
    subprocess.run([hg, "init", "r"], cwd=directory, check=True, env=environment)
    subprocess.run(
        [hg, "-R", "r", "debugbuilddag", "-m", "-n", "+400"],
        cwd=directory,
        check=True,
        env=environment,
        capture_output=True,
    )
    return [hg, "-R", "r", "log", "-p", "-v", "--graph"]


def _rsync(directory: Path) -> Sequence[str]:
    for number in range(20000):
        path = directory / "from" / f"d{number % 97}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}" * (number % 50))
    return [tool("rsync", "rsync"), "-a", "--checksum", "--bwlimit=200", "from/", "to/"]


def _mariadb(directory: Path) -> Sequence[str]:
    server = tool("mariadbd", "mariadb-server-core")
    (directory / "data").mkdir()
    (directory / "data" / "mysql").mkdir()
    return [
        server, "--no-defaults", "--bootstrap", f"--datadir={directory / 'data'}", "--user=root", "--innodb-buffer-pool-size=8M", "--innodb-log-file-size=4M",
        "--key-buffer-size=1M", "--aria-pagecache-buffer-size=1M", "--skip-grant-tables", "--skip-stack-trace", "--core-file",
    ]  # fmt: skip


def _website(prepare: Prepare) -> Prepare:
    def prepared(directory: Path) -> Sequence[str]:
        (directory / "www").mkdir()
        (directory / "www" / "index.html").write_text("hello " * 3000)
        return _with_port(prepare)(directory)

    return prepared


def _feed_only(package: str, *command: str) -> Prepare:
    return script(package, "empty", "", *command)


TOOLS = {
    "ffmpeg-x264": Worker("ffmpeg", _feed_only("ffmpeg", "ffmpeg", "-nostdin", "-v", "error", "-f", "lavfi", "-i", "testsrc2=size=640x360:rate=30", "-c:v", "libx264", "-preset", "medium", "-threads", "3", "-f", "null", "-"), starts_in=0.8),
    "imagemagick": Worker("imagemagick", _feed_only("imagemagick", "convert", "-limit", "thread", "2", "-size", "700x500", "plasma:red-blue", *(["-blur", "0x3", "-rotate", "9", "-resize", "700x500!", "-swirl", "20", "-paint", "2"] * 20), "out.png"), lasts=2.0),
    "apache2": Worker("apache2-bin", _website(_files("apache2-bin", {"httpd.conf": APACHE}, "apache2", "-X", "-f", "@/httpd.conf")), user="www-data", visit=_http, starts_in=0.5),
    "lighttpd": Worker("lighttpd", _website(_files("lighttpd", {"lighttpd.conf": LIGHTTPD}, "lighttpd", "-D", "-f", "@/lighttpd.conf")), visit=_http, starts_in=0.4),
    "haproxy": Worker("haproxy", _website(_files("haproxy", {"haproxy.cfg": HAPROXY}, "haproxy", "-db", "-f", "@/haproxy.cfg")), visit=_http, starts_in=0.5),
    "squid": Worker("squid", _website(_files("squid", {"squid.conf": SQUID}, "squid", "-N", "-f", "@/squid.conf")), user="proxy", visit=_http, starts_in=0.7),
    "unbound": Worker("unbound", _with_port(_files("unbound", {"unbound.conf": UNBOUND}, "unbound", "-d", "-c", "@/unbound.conf")), visit=_dns, starts_in=0.4),
    "dnsmasq": Worker("dnsmasq-base", _with_port(_files("dnsmasq-base", {"hosts": "".join(f"10.1.{n // 250}.{n % 250} h{n}.example.test\n" for n in range(3000))}, "dnsmasq", "-d", "-p", "PORT", "-a", "127.0.0.1", "-z", "-C", "/dev/null", "-R", "-h", "-H", "@/hosts", "-u", "root", "-c", "900")), visit=_dns, starts_in=0.3),
    "memcached": Worker("memcached", _feed_only("memcached", "memcached", "-u", "root", "-s", "socket", "-m", "20"), visit=_memcached, starts_in=0.3),
    "mariadb": Worker("mariadb-server-core", _mariadb, feed=MARIADB, starts_in=1.5),
    "slapadd": Worker("slapd", _files("slapd", {"slapd.conf": SLAPD, "work.ldif": LDIF, "load": "rm -rf @/db; mkdir @/db; exec /usr/sbin/slapadd -q -f @/slapd.conf -l @/work.ldif\n"}, "sh", "@/load"), starts_in=0.3, lasts=1.5),
    "testparm": Worker("samba-common-bin", _files("samba-common-bin", {"smb.conf": SAMBA}, "testparm", "-s", "@/smb.conf"), starts_in=0.1, lasts=1.0),
    "svnadmin": Worker("subversion", _subversion, starts_in=0.4, lasts=1.5),
    "mercurial": Worker("mercurial", _mercurial, starts_in=0.5, allocators=frozenset({"pymalloc"})),
    "rsync": Worker("rsync", _rsync, starts_in=0.1),
    "7zip": Worker("7zip", _feed_only("7zip", "7zz", "a", "-mmt2", "-mx5", "-m0=lzma2:d4m", "-siwork", "-so", "-txz", "none"), feed=TEXT),
    "zstd": Worker("zstd", _feed_only("zstd", "zstd", "-q", "-12", "-T2", "-c"), feed=TEXT),
    "brotli": Worker("brotli", _feed_only("brotli", "brotli", "-q", "9", "-c"), feed=TEXT),
    "graphviz": Worker("graphviz", _files("graphviz", {"work.dot": GRAPH}, "dot", "-Tsvg", "@/work.dot", "-o", "out.svg"), starts_in=0.2, lasts=2.0),
    "pdftoppm": Worker("poppler-utils", _pdf("poppler-utils", "pdftoppm", "-r", "60", "-png", "work.pdf", "out"), starts_in=0.2, lasts=2.0),
    "pdftotext": Worker("poppler-utils", _pdf("poppler-utils", "pdftotext", "-layout", "work.pdf", "out"), starts_in=0.1, lasts=0.6),
    "ghostscript": Worker("ghostscript", script("ghostscript", "work.ps", POSTSCRIPT, "gs", "-q", "-dBATCH", "-dNOPAUSE", "-sDEVICE=png16m", "-r50", "-sOutputFile=/dev/null", "work.ps"), starts_in=0.3),
    "rsvg-convert": Worker("librsvg2-bin", _files("librsvg2-bin", {"work.svg": SVG}, "rsvg-convert", "@/work.svg", "-o", "out.png"), starts_in=0.2, lasts=1.5),
    "make": Worker("make", _files("make", {"Makefile": MAKEFILE}, "make", "-r", "-s"), starts_in=0.1, lasts=0.6),
    "cmake": Worker("cmake", script("cmake", "work.cmake", CMAKE, "cmake", "-P", "work.cmake")),
    "troff": Worker("groff-base", _files("groff-base", {"work.tr": TROFF}, "troff", "-Tutf8", "@/work.tr"), starts_in=0.1),
}  # fmt: skip
