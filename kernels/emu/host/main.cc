// SPDX-License-Identifier: Apache-2.0
// The program around the kernels: one launch a process. A description comes on standard input, as lines:
//   kernel NAME | seed N | grid X Y Z | block X Y Z | shared BYTES | resident N | cluster N | seconds N (of the processor) | flag NAME
//   buffer NAME BYTES ALIGN in|out|inout [dependent]
//   arg ptr BUFFER OFFSET | arg val HEX
//   data
// then the bytes of the in and inout buffers. Standard output gets a line of counts, then the bytes of the out and inout buffers.
// With --constants it prints the program's constants instead. A fault goes to standard error; the exit status is then 3.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/resource.h>
#include <unistd.h>
#include "core.h"

namespace zsemu {
static Entry* entries;
Entry::Entry(const char* n, void (*c)(const uint64_t*), int p) : name(n), call(c), params(p), next(entries) { entries = this; }
static Constant* constants;
Constant::Constant(const char* n, long long v) : name(n), value(v), next(constants) { constants = this; }
}  // namespace zsemu

using namespace zsemu;

[[noreturn]] static void usage(const std::string& why) {
  fprintf(stderr, "fault: setup\ntext: %s\n", why.c_str());
  exit(2);
}

static void on_signal(int sig, siginfo_t* info, void*) {
  if (sig == SIGXCPU) fault("timeout", "the launch used up its processor time");
  static char text[160];
  snprintf(text, sizeof text, "%s at address %p", sig == SIGSEGV ? "segmentation fault (a stack overflow or an unchecked access)" : sig == SIGFPE ? "arithmetic fault" : "bus error",
           info->si_addr);
  fault("crash", "%s", text);
}

int main(int argc, char** argv) {
  if (argc > 1 && !strcmp(argv[1], "--constants")) {
    for (Constant* c = constants; c; c = c->next) printf("%s %lld\n", c->name, c->value);
    return 0;
  }
  static uint8_t alternate[64 << 10];
  stack_t ss{};
  ss.ss_sp = alternate;
  ss.ss_size = sizeof alternate;
  sigaltstack(&ss, nullptr);
  struct sigaction sa {};
  sa.sa_sigaction = on_signal;
  sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGXCPU}) sigaction(s, &sa, nullptr);

  struct Buffer {
    Region* region;
    bool in, out;
  };
  std::vector<Buffer> buffers;
  std::string kernel;
  char line[512], word[128], word2[128], word3[128];
  Options& o = g.opt;
  while (fgets(line, sizeof line, stdin) && strcmp(line, "data\n")) {
    unsigned long long a, b;
    if (sscanf(line, "kernel %127s", word) == 1) {
      kernel = word;
    } else if (sscanf(line, "seed %llu", &a) == 1) {
      o.seed = a;
    } else if (sscanf(line, "grid %u %u %u", &o.grid.x, &o.grid.y, &o.grid.z) == 3 || sscanf(line, "block %u %u %u", &o.block.x, &o.block.y, &o.block.z) == 3) {
    } else if (sscanf(line, "shared %llu", &a) == 1) {
      o.shared = a;
    } else if (sscanf(line, "seconds %llu", &a) == 1) {
      rlimit limit{rlim_t(a), rlim_t(a + 5)};
      setrlimit(RLIMIT_CPU, &limit);
    } else if (sscanf(line, "resident %llu", &a) == 1) {
      o.resident = uint32_t(a);
    } else if (sscanf(line, "cluster %llu", &a) == 1) {
      o.cluster = uint32_t(a);
    } else if (sscanf(line, "flag %127s", word) == 1) {
      std::string f = word;
      if (f == "no-races")
        o.races = false;
      else if (f == "allow-uninitialised")
        o.strict_init = false;
      else if (f == "pdl")
        o.pdl = true;
      else
        usage("unknown flag " + f);
    } else if (int n = sscanf(line, "buffer %127s %llu %llu %127s %127s", word, &a, &b, word2, word3); n >= 4) {
      std::string mode = word2;
      Region r;
      r.name = word;
      r.size = a;
      r.writable = mode != "in";
      r.dependent = n == 5 && !strcmp(word3, "dependent");
      if (!b || (b & (b - 1))) usage("an alignment must be a power of two");
      r.base = map_guarded(r.size, b, true);
      buffers.push_back({add_region(r), mode != "out", mode != "in"});
    } else if (sscanf(line, "arg ptr %llu %llu", &a, &b) == 2) {
      if (a >= buffers.size()) usage("an argument names no buffer");
      g.args.push_back(uint64_t(uintptr_t(buffers[a].region->base + b)));
    } else if (sscanf(line, "arg val %llx", &a) == 1) {
      g.args.push_back(a);
    } else {
      usage(std::string("cannot read the line ") + line);
    }
  }
  for (Entry* e = entries; e; e = e->next)
    if (kernel == e->name) g.entry = e;
  if (!g.entry) usage("the program has no kernel " + kernel);
  if (g.entry->params != int(g.args.size())) usage(format("kernel %s takes %d parameters, %zu are given", kernel.c_str(), g.entry->params, g.args.size()));
  if (g.args.size() > 64) usage("more than 64 parameters");
  if (o.shared > 227 << 10) usage("more shared memory than a block can have (227 KiB)");
  size_t threads = size_t(o.block.x) * o.block.y * o.block.z, blocks = size_t(o.grid.x) * o.grid.y * o.grid.z;
  if (!o.cluster || o.cluster > kMaxCluster) usage(format("a cluster has 1 .. %u blocks", kMaxCluster));
  if (o.grid.x % o.cluster || o.resident % o.cluster) usage(format("the grid along x, and the resident blocks, must be multiples of the cluster of %u blocks", o.cluster));
  if (!threads || threads > 1024 || !blocks) usage("a block has 1 .. 1024 threads, a grid at least one block");
  size_t alive = o.resident && o.resident < blocks ? o.resident : blocks;
  if (alive * (threads + kMaxMbarriers) + 1 >= kNobody) usage("too many threads alive at once: set resident");
  g.threads = uint32_t(threads);
  g.resident = uint32_t(alive);
  lay_out_gids(g.resident, g.threads, kMaxMbarriers, o.cluster > 1);

  for (auto& b : buffers) {
    Region& r = *b.region;
    if (b.in) {
      if (fread(r.base, 1, r.size, stdin) != r.size) usage("the data of buffer " + r.name + " is cut short");
      if (!r.writable) continue;
      bool previous = r.dependent && o.pdl;
      mark_written(r, 0, r.size, previous ? previous_grid_gid() : kNobody, previous, 0, kInit);
    } else {
      memset(r.base, kPoison, r.size);
      if (r.dependent && o.pdl) mark_written(r, 0, r.size, previous_grid_gid(), 1, 0, 0);
    }
  }
  run_launch();
  printf("switches %llu collectives %llu copies %llu bulk_bytes %llu matrices %llu conflicts %llu\n", (unsigned long long)g.switches, (unsigned long long)g.collectives,
         (unsigned long long)g.copies, (unsigned long long)g.bulk_bytes, (unsigned long long)g.matrices, (unsigned long long)g.conflicts);
  for (auto& b : buffers)
    if (b.out) fwrite(b.region->base, 1, b.region->size, stdout);
  fflush(stdout);
  _exit(0);
}
