"""The campaign's programs: interpreters, compilers, and programs that they make. Data; each works without end, or for long."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.real_cores.real_programs import CannotRun, tool
from tests.real_cores.workers import Worker

Prepare = Callable[[Path], Sequence[str]]


def script(package: str, name: str, content: str, *command: str, check: tuple[str, ...] = ()) -> Prepare:
    """A file with this content beside a command of this package. With the words of ``check`` the command tells whether it has
    all that it needs: a small package may bring it alone."""

    def prepare(directory: Path) -> Sequence[str]:
        (directory / name).write_text(content)
        program = tool(command[0], package)
        if check and subprocess.run([program, *check], capture_output=True, check=False).returncode != 0:
            raise CannotRun(f"{program} lacks its modules: apt-get install {package}")
        return [program, *command[1:]]

    return prepare


NUMPY = """
import numpy as np
random = np.random.default_rng(3); kept = {}
while True:
    size = int(random.integers(1, 1200))
    kept[int(random.integers(12))] = random.random((size, 700))
    a = kept[next(iter(kept))]; b = np.sort(a, axis=0); kept[50] = b @ b.T if size < 300 else np.fft.rfft(b)[: , :50]
    kept[60 + size % 5] = np.array([str(x) for x in range(size)])
"""
RUBY = """
srand 4; kept = {}
loop do
  key = "k#{rand 900}"; kept[key] = (1..rand(60)).map { |i| [i, "x" * rand(900), { i => key * 3 }] }
  kept.delete("k#{rand 900}"); text = kept.values.first.inspect.gsub(/x+/) { |m| m.size.to_s }
  kept[text[0, 20]] = text.split(",").sort.uniq.map(&:to_sym) if rand < 0.1; kept.shift if kept.size > 700
end
"""
PHP = """<?php
mt_srand(4); $kept = [];
while (true) {
  $key = 'k' . mt_rand(0, 900); $kept[$key] = json_decode(json_encode(range(0, mt_rand(1, 400))), true);
  $document = new DOMDocument(); $document->loadXML('<a>' . str_repeat('<b c="d">text</b>', mt_rand(1, 300)) . '</a>');
  $kept[$key . 'x'] = [$document, gzcompress(serialize($kept[$key])), preg_split('/,/', implode(',', $kept[$key]))];
  unset($kept['k' . mt_rand(0, 900) . 'x']); if (count($kept) > 600) array_splice($kept, 0, 300);
}
"""
NODE = """
const zlib = require('zlib'); const kept = new Map(); let n = 0;
function work() {
  for (let i = 0; i < 40; i++) { n = (n * 7919 + 1) % 100003;
    kept.set(n % 700, { text: JSON.stringify([...Array(n % 300).keys()]), buffer: Buffer.alloc(n % 90000, n % 255) });
    if (n % 7 == 0) zlib.deflate(Buffer.alloc(n % 50000, 'ab'), (e, r) => kept.set(-(n % 50), r)); }
  setImmediate(work);
}
work();
"""
LUA = """
math.randomseed(4); local kept = {}
while true do
  local key = math.random(900); local t = {}
  for i = 1, math.random(80) do t[i] = { i, string.rep("x", math.random(400)), [key .. i] = key } end
  kept[key] = t; kept[math.random(900)] = nil
  local co = coroutine.wrap(function() for i = 1, 5 do coroutine.yield(table.concat({ "a", i, key }, ",")) end end)
  kept[-math.random(90)] = co() .. ("%s"):format(tostring(t):gsub("%d", "%0%0"))
end
"""
R = """
set.seed(4); kept <- list()
repeat {
  n <- sample(4000, 1); d <- data.frame(a = rnorm(n), b = sample(letters, n, TRUE), c = paste0("t", seq_len(n)))
  kept[[as.character(n %% 60)]] <- list(d, aggregate(a ~ b, d, mean), if (n > 50) lm(a ~ b, d), strsplit(d$c, "t"))
  kept[[as.character((n + 7) %% 60)]] <- sort(d$c); m <- matrix(rnorm(90000), 300); kept$m <- solve(m)
}
"""
GUILE = """
(define kept (make-hash-table))
(let loop ((n 1))
  (hash-set! kept (modulo (* n 7919) 901)
    (map (lambda (i) (cons i (make-string (modulo (* i n) 300) #\\x))) (iota (modulo n 90))))
  (hash-set! kept (- (modulo n 50)) (expt 3 (modulo (* n 31) 9000)))
  (hash-set! kept "text" (with-output-to-string (lambda () (write (hash-ref kept (modulo n 901))))))
  (loop (+ n 1)))
"""
CSHARP = """
using System; using System.Collections.Generic; using System.Linq; using System.Runtime.InteropServices; using System.Threading;
class Work {
  static void Main() {
    for (int i = 0; i < 2; i++) { var t = new Thread(() => Loop(7)); t.IsBackground = true; t.Start(); } Loop(4); }
  static void Loop(int seed) {
    var r = new Random(seed); var kept = new Dictionary<int, object>(); var native = new IntPtr[300];
    while (true) { int k = r.Next(600);
      kept[k] = Enumerable.Range(0, r.Next(200)).Select(i => "t" + i).ToArray(); kept[-k] = new byte[r.Next(9000)];
      int n = r.Next(300); Marshal.FreeHGlobal(native[n]); native[n] = Marshal.StringToHGlobalAnsi(new string('x', r.Next(9000)));
    } } }
"""
HASKELL = """
import Control.Concurrent
import Control.Monad
import qualified Data.Map.Strict as M
import Foreign.Marshal.Alloc
import Foreign.Ptr
import Data.IORef
work :: Int -> IO ()
work s = newIORef M.empty >>= \\r -> forM_ [s ..] $ \\n -> do
  p <- mallocBytes (n * 7919 `mod` 9001 + 1) :: IO (Ptr ())
  m <- readIORef r
  maybe (return ()) free (M.lookup (n `mod` 701) m)
  writeIORef r $! M.insert (n `mod` 701) p m
main :: IO ()
main = forM_ [1 .. 3] (forkIO . work) >> work 9
"""
HASKELL_MODULE = "module Main where\nimport qualified Data.Map as M\n" + "".join(
    f"data T{n} = A{n} Int | B{n} [T{n}] | C{n} {{ f{n} :: M.Map Int T{n} }} deriving (Show, Eq, Ord, Read)\n"
    for n in range(90)
) + "main :: IO ()\nmain = print (A1 3)\n"  # fmt: skip
OCAML = """
let kept = Hashtbl.create 100
let () = Random.init 4; while true do
  let k = Random.int 700 in
  Hashtbl.replace kept k (Bigarray.Array1.create Bigarray.float64 Bigarray.c_layout (1 + Random.int 9000), Marshal.to_bytes (List.init (Random.int 300) string_of_int) []);
  Hashtbl.remove kept (Random.int 700);
  let b = Buffer.create 10 in for i = 0 to Random.int 9000 do Buffer.add_string b (string_of_int i) done;
  ignore (Hashtbl.hash (Buffer.contents b)) done
"""
GO = """
package main
// #include <stdlib.h>
// #include <string.h>
import "C"
import ("math/rand"; "unsafe"; "strings")
func work(seed int64) {
  r := rand.New(rand.NewSource(seed)); kept := map[int]unsafe.Pointer{}; texts := map[int]string{}
  for { k := r.Intn(600)
    if p, ok := kept[k]; ok { C.free(p) }
    kept[k] = C.malloc(C.size_t(r.Intn(9000) + 1)); s := C.CString(strings.Repeat("x", r.Intn(3000)))
    texts[k] = C.GoString(s); C.free(unsafe.Pointer(s)) } }
func main() { for i := int64(1); i < 4; i++ { go work(i) }; work(9) }
"""
EMACS = """
(require 'json)
(let ((kept (make-hash-table)) (n 0))
  (while t
    (setq n (% (+ (* n 7919) 1) 100003))
    (with-temp-buffer (dotimes (i (% n 300)) (insert (format "line %d of %d\\n" i n)))
      (goto-char (point-min)) (while (re-search-forward "line \\\\([0-9]+\\\\)" nil t) (replace-match "x\\\\1"))
      (puthash (% n 500) (list (buffer-string) (make-vector (% n 900) n) (json-encode (number-sequence 1 (% n 60)))) kept))
    (remhash (% (* n 3) 500) kept)))
"""
ERLANG = (
    "T = ets:new(t, [public]), F = fun F(N) -> K = (N * 7919) rem 901, "
    "ets:insert(T, {K, lists:seq(1, N rem 300), binary:copy(<<\"xyz\">>, N rem 30000)}), ets:delete(T, (K * 3) rem 901), "
    "zlib:compress(term_to_binary(lists:seq(1, N rem 900))), F(N + 1) end, [spawn(fun() -> F(I) end) || I <- [1, 5, 9]], F(3)."
)  # fmt: skip
SBCL = """
(defvar *kept* (make-hash-table)) (defvar *native* (make-array 300 :initial-element nil))
(loop for n from 1 do
  (setf (gethash (mod (* n 7919) 901) *kept*) (list (make-string (mod n 300)) (loop for i below (mod n 90) collect (format nil "~a" i))))
  (let ((k (mod (* n 31) 300)))
    (when (aref *native* k) (sb-alien:free-alien (aref *native* k)))
    (setf (aref *native* k) (sb-alien:make-alien (sb-alien:unsigned 8) (1+ (mod (* n 77) 9000))))))
"""
VIM = """
let n = 0
let kept = {}
while 1
  let n = (n * 7919 + 1) % 100003
  let kept[n % 500] = map(range(n % 200), '"line " . v:val . repeat("x", v:val % 50)')
  call setline(1, kept[n % 500])
  silent! %s/line \\(\\d\\+\\)/\\1 line/g
  call remove(kept, keys(kept)[0])
  let kept[n % 500] = [json_encode(kept), getline(1, '$')]
  if n % 40 == 0 | bwipeout! | let kept = {} | endif
endwhile
"""
TCL = """
set n 1
while 1 {
  set n [expr {($n * 7919 + 1) % 100003}]
  set kept([expr {$n % 600}]) [lmap i [lrepeat [expr {$n % 200}] x] {string repeat $i [expr {$n % 90}]}]
  array unset kept [expr {($n * 3) % 600}]
  dict set d [expr {$n % 70}] [regsub -all {x+} [join [array get kept 1] ,] {<&>}]
  proc p$n {a} "return \\[string length \\$a\\]$n"; if {$n % 3} {rename p$n {}}
}
"""
RACKET = """
#lang racket/base
(require racket/list racket/string ffi/unsafe)
(define kept (make-hash)) (define native (make-vector 300 #f))
(let loop ([n 1])
  (hash-set! kept (modulo (* n 7919) 901) (for/list ([i (modulo n 90)]) (string-append* (make-list 5 (number->string (* i n))))))
  (define k (modulo (* n 31) 300))
  (when (vector-ref native k) (free (vector-ref native k)))
  (vector-set! native k (malloc 'raw (add1 (modulo (* n 77) 9000))))
  (loop (add1 n)))
"""
PROLOG = """
:- dynamic fact/3.
loop(N) :- K is (N * 7919) mod 901, retractall(fact(K, _, _)), numlist(1, 40, L), atomic_list_concat(L, N, A),
  assertz(fact(K, A, [L, N])), string_concat(A, A, S), nb_setval(key, S), findall(X-Y, fact(X, Y, _), R), msort(R, _), N1 is N + 1, loop(N1).
:- initialization(loop(1)).
"""
FORTH = """
create kept 300 cells allot  kept 300 cells erase  variable n  1 n !
: slot 300 mod cells kept + ;
: work begin n @ 7919 * 1+ 100003 mod n !  n @ slot dup @ ?dup if free throw then
  n @ 9000 mod 16 + allocate throw dup n @ 255 and over c! drop swap ! again ;
work
"""
OCTAVE = """
rand("seed", 4); kept = {};
while true
  n = floor(rand * 300) + 2; m = rand(n); kept{mod(n, 40) + 1} = {inv(m + n * eye(n)), num2cell(1:n), struct("a", {m(1, :), "text"})};
  kept{mod(n * 7, 40) + 1} = regexprep(sprintf("%d,", 1:n), '(\\d)', 'x$1'); s = sparse(m > 0.9); kept{50} = s * s';
end
"""
GAWK = """BEGIN { srand(2); while (1) { k = int(rand() * 700); a[k][int(rand() * 40)] = sprintf("%s-%d", k, rand() * 1e6) a[k][1];
  if (length(a[k][1]) > 900 || rand() < .1) delete a[k]; n = split(sprintf("%*d", 300, k), p, ""); gsub(/1+/, "<&>", p[n]); s = p[n] s; s = substr(s, 1, 5000)
  c = asorti(a, b) } }"""
BC = "scale = 900\nfor (n = 1; 1; n++) { x[n % 700] = sqrt(n) * x[(n * 7) % 700] + n ^ (n % 90); if (n % 40 == 0) x[n % 700] = 0; }\n"
MAXIMA = (
    'kept: [];\nfor n: 1 step 1 while true do (kept: cons(expand((x + y + n)^(10 + mod(n, 15))), rest(kept, -min(length(kept), 1))), '
    'kept: append(kept, [factor(x^(mod(n, 20) + 2) - 1), integrate(sin(x)^mod(n, 6) * x, x), invert(genmatrix(lambda([i, j], 1 / (i + j + n)), 9, 9))]), '
    'if length(kept) > 60 then kept: []);\n'
)  # fmt: skip
GNUPLOT = (
    'set terminal svg\nset output "/dev/null"\nset samples 3000\nset isosamples 60\n'
    + "plot sin(x), cos(x) title 'one', x**2 with points\nsplot x*y with pm3d, sin(x)*y\n"
    "$data << EOD\n1 2\n3 4\n5 9\nEOD\nplot $data with linespoints smooth csplines\nreset\nset terminal svg\nset output '/dev/null'\n"
)  # fmt: skip
PERL = """
use strict; use threads; use Data::Dumper; use Encode; use JSON::PP; use Storable qw(dclone freeze thaw); use Digest::SHA qw(sha256_hex);
sub work { srand shift; my %kept; while (1) { my $k = int rand 400;
  $kept{$k} = dclone([map { { n => $_, t => sha256_hex($_) x rand 5 } } 1 .. rand 30]); delete $kept{int rand 400};
  $kept{-$k} = encode('UTF-16', JSON::PP->new->encode($kept{$k})); $kept{x} = thaw freeze {%kept{(grep { $_ > 0 } keys %kept)[0] // 'x'}}; } }
threads->create(\\&work, $_) for 1 .. 2; work(9);
"""
JQ = "def f(n): n as $n | {a: [range($n % 90)], b: ($n | tostring | [., .] | join(\"-\")), c: {d: ($n * 7919 % 901)}}; " \
    "last(foreach range(1e9) as $i ({}; .[($i * 7919 % 301 | tostring)] = f($i); (. | tojson | fromjson | keys | length)))"  # fmt: skip


def _compiled(package: str, name: str, content: str, *command: str) -> Prepare:
    """A program made of this source by this command, which writes `work`."""

    def prepare(directory: Path) -> Sequence[str]:
        (directory / name).write_text(content)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(directory),
            "GOCACHE": str(directory / "cache"),
            "GO111MODULE": "off",
        }
        words = [tool(command[0], package), *command[1:]]
        subprocess.run(words, cwd=directory, check=True, env=environment, capture_output=True)
        return [str(directory / "work")]

    return prepare


def _mono(directory: Path) -> Sequence[str]:
    (directory / "work.cs").write_text(CSHARP)
    subprocess.run(
        [tool("mcs", "mono-mcs"), "-out:work.exe", "work.cs"], cwd=directory, check=True, capture_output=True
    )
    return [tool("mono", "mono-runtime"), "work.exe"]


def _templates(functions: int) -> str:
    head = "#include <map>\n#include <string>\n#include <vector>\n#include <algorithm>\n"
    return head + "".join(
        f"struct S{n} {{ std::map<std::string, std::vector<int>> m; int a[{n % 30 + 1}]; }};\n"
        f"int f{n}(S{n} &s, int k) {{ for (auto &[x, y] : s.m) std::sort(y.begin(), y.end(), [&](int a, int b) {{ return a * {n} < b + k; }});\n"
        f"  return s.m.size() + std::count_if(s.a, s.a + {n % 30 + 1}, [=](int i) {{ return i > k; }}); }}\n"
        for n in range(functions)
    )


def _rust(functions: int) -> str:
    return "use std::collections::HashMap;\n" + "".join(
        f"#[derive(Debug, Clone, PartialEq)] pub struct S{n} {{ m: HashMap<String, Vec<i{8 << n % 4}>>, a: [u8; {n % 30 + 1}] }}\n"
        f"pub fn f{n}(s: &mut S{n}, k: usize) -> usize {{ for (_, v) in s.m.iter_mut() {{ v.sort(); v.retain(|x| *x as usize > k + {n}); }}\n"
        f'  s.a.iter().map(|x| *x as usize * k).filter(|x| x % 3 == 0).sum::<usize>() + format!("{{:?}}", s).len() }}\n'
        for n in range(functions)
    )


LANGUAGES = {
    "numpy": Worker("python3-numpy", script("python3-numpy", "work.py", NUMPY, "python3", "work.py"), starts_in=0.6, allocators=frozenset({"pymalloc"})),
    "ruby": Worker("ruby", script("ruby", "work.rb", RUBY, "ruby", "work.rb")),
    "php": Worker("php-cli php-xml", script("php-cli", "work.php", PHP, "php", "work.php")),
    "node": Worker("nodejs", script("nodejs", "work.js", NODE, "node", "--max-old-space-size=90", "work.js")),
    "lua": Worker("lua5.4", script("lua5.4", "work.lua", LUA, "lua5.4", "work.lua")),
    "R": Worker("r-base-core", script("r-base-core", "work.R", R, "R", "--no-save", "--slave", "-f", "work.R"), starts_in=1.0),
    "guile": Worker("guile-3.0", script("guile-3.0", "work.scm", GUILE, "guile", "--no-auto-compile", "work.scm")),
    "mono": Worker("mono-runtime mono-mcs", _mono, starts_in=0.6),
    "ghc": Worker("ghc", script("ghc", "Main.hs", HASKELL_MODULE, "ghc", "-O1", "Main.hs"), starts_in=0.8, lasts=3.0),
    "haskell": Worker("ghc", _compiled("ghc", "work.hs", HASKELL, "ghc", "-O1", "-threaded", "-rtsopts", "-with-rtsopts=-N2 -M80m", "-o", "work", "work.hs")),
    "ocaml": Worker("ocaml-nox", _compiled("ocaml-nox", "work.ml", OCAML, "ocamlopt", "-o", "work", "work.ml")),
    "go-cgo": Worker("golang-go", _compiled("golang-go", "work.go", GO, "go", "build", "-o", "work", "work.go"), environment={"GOTRACEBACK": "crash"}, allocators=frozenset({"Go"})),
    "emacs": Worker("emacs-nox", script("emacs-nox", "work.el", EMACS, "emacs", "-Q", "--batch", "-l", "work.el"), starts_in=0.4),
    "clang": Worker("clang", script("clang", "work.cc", _templates(700), "clang", "-O2", "-g", "-c", "work.cc"), starts_in=0.5, lasts=3.0, dies=False),
    "rustc": Worker("rustc", script("rustc", "work.rs", _rust(400), "rustc", "-O", "--crate-type=lib", "work.rs"), starts_in=0.5, lasts=3.0),
    "erlang": Worker("erlang-base", script("erlang-base", "empty", "", "erl", "-noshell", "-eval", ERLANG), starts_in=0.8),
    "sbcl": Worker("sbcl", script("sbcl", "work.lisp", SBCL, "sbcl", "--dynamic-space-size", "200MB", "--script", "work.lisp")),
    "vim": Worker("vim-nox", script("vim-nox", "work.vim", VIM, "vim.nox", "-e", "-s", "-u", "NONE", "-S", "work.vim")),
    "tcl": Worker("tcl", script("tcl", "work.tcl", TCL, "tclsh", "work.tcl")),
    "racket": Worker("racket", script("racket", "work.rkt", RACKET, "racket", "work.rkt"), starts_in=1.0),
    "swipl": Worker("swi-prolog-nox", script("swi-prolog-nox", "work.pl", PROLOG, "swipl", "--no-signals", "work.pl"), starts_in=0.4, allocators=frozenset({"tcmalloc"}), has_glibc_malloc=False),
    "gforth": Worker("gforth", script("gforth", "work.fs", FORTH, "gforth", "work.fs"), dies=False),
    "octave": Worker("octave", script("octave", "work.m", OCTAVE, "octave-cli", "--no-init-file", "work.m"), starts_in=0.8),
    "gawk": Worker("gawk", script("gawk", "work.awk", GAWK, "gawk", "-f", "work.awk")),
    "bc": Worker("bc", script("bc", "work.bc", BC, "bc", "-q", "work.bc")),
    "maxima": Worker("maxima", script("maxima", "work.mac", MAXIMA, "maxima", "--very-quiet", "-b", "work.mac"), environment={"GCL_MEM_MULTIPLE": "0.02"}, starts_in=1.0),
    "gnuplot": Worker("gnuplot-nox", script("gnuplot-nox", "empty", "", "gnuplot"), feed=GNUPLOT),
    "perl-threads": Worker(
        "perl",
        # perl-base has no such modules.
        script("perl", "work.pl", PERL, "perl", "work.pl", check=("-Mthreads", "-MJSON::PP", "-e", "1")),
        starts_in=0.4,
    ),
    "jq": Worker("jq", script("jq", "empty", "", "jq", "-n", JQ)),
}  # fmt: skip
