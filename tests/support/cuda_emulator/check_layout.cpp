// Index arithmetic of the kernels: that what a warp reads or writes at once lies in different banks of shared memory,
// and that tiles and parts cover everything once.
#include <cstdio>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "backward.h"
#include "forward.h"
#include "plan.h"

namespace {

using namespace grjca;
using namespace grjca::cuda;

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Shared memory has 32 banks of 4 bytes, and serves 128 bytes at a time: so many lanes as that is together.
void expect_no_conflict(const std::vector<int>& bytes, int size, const std::string& what) {
  const size_t together = 128 / size;
  for (size_t first = 0; first < bytes.size(); first += together) {
    std::set<int> banks;
    for (size_t i = first; i < std::min(first + together, bytes.size()); ++i)
      for (int b = 0; b < size; b += 4) banks.insert((bytes[i] + b) / 4 % 32);
    expect(banks.size() == 32, what + ": two lanes meet in a bank");
  }
}

template <class T, Major kMajor>
void check_matrices(const std::string& what) {
  constexpr int kWidth = kLine<T, kMajor>;
  std::vector<int> a, b;
  for (int lane = 0; lane < kWarp; ++lane) {
    a.push_back(place_of_a<kMajor>(lane, kWidth) * 2);
    b.push_back(place_of_b<kMajor>(lane, kWidth) * 2);
  }
  expect_no_conflict(a, 16, "A, " + what);
  expect_no_conflict(b, 16, "B, " + what);
}

template <Major kMajor>
void check_words(int line, const std::string& what) {
  for (int i = 0; i < 4; ++i) {
    std::vector<int> a, b;
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread me{lane};
      a.push_back(place<kMajor>(me.g() + i % 2 * 8, me.t() + i / 2 * 4, line) * 4);
      b.push_back(place<kMajor>(me.g() + i / 2 * 8, me.t() + i % 2 * 4, line) * 4);
    }
    expect_no_conflict(a, 4, "A, " + what);
    expect_no_conflict(b, 4, "B, " + what);
  }
}

void check_banks() {
  check_matrices<BFloat16, Major::terms>("16-bit, terms contiguous");
  check_matrices<BFloat16, Major::outer>("16-bit, terms apart");
  check_words<Major::terms>(kLine<float, Major::terms>, "float, terms contiguous");
  check_words<Major::outer>(kLine<float, Major::outer>, "float, terms apart");
  check_words<Major::outer>(kStreamLine, "float, frames");
  std::vector<int> sums;
  for (int lane = 0; lane < kWarp; ++lane) {
    const Thread me{lane};
    sums.push_back((me.g() * kSumsLine + 2 * me.t()) * 4);
  }
  expect_no_conflict(sums, 8, "sums");
  expect(kStageBytes >= kTile * kLine<float, Major::terms> * 4 &&
             kStageBytes >= kTerms<float> * kLine<float, Major::outer> * 4,
         "a stage holds either layout");
  expect(kTile * kSumsLine * 4 <= kSharedBytes, "shared memory holds the sums of a tile");
}

// In whatever pieces an alignment allows, n elements are copied, and zeros up to 16 bytes.
template <class T>
void check_copies(const std::string& what) {
  constexpr int kSize = sizeof(T), kChunk = 16 / kSize;
  for (int bytes = 16; bytes >= kSize; bytes /= 2)
    for (int n = 0; n <= kChunk; ++n) {
      // `bytes` is all that the address is a multiple of, and nothing stands behind the last element.
      std::vector<char> memory(bytes % 16 + n * kSize);
      std::iota(memory.begin(), memory.end(), 1);
      const auto address = reinterpret_cast<uintptr_t>(memory.data()) + bytes % 16;
      const T* const from = reinterpret_cast<const T*>(address);
      emulator::run({1, kThreads, 16 * kThreads, 0}, [&] {
        const Thread me = this_thread();
        T* const to = reinterpret_cast<T*>(shared_memory()) + me.index * kChunk;
        copy_pieces(to, from, n, bytes);
        copy_commit();
        copy_wait<0>();
        for (int i = 0; i < kChunk; ++i)
          expect(bits_of(read_shared(to + i)) == (i < n ? bits_of(from[i]) : 0),
                 what + ": " + std::to_string(n) + " elements by " + std::to_string(bytes) + " bytes");
      });
    }
}

Problem problem_of(int batch, int length, std::vector<int> widths, int iterations, Gating gating) {
  Problem p{};
  p.batch = batch;
  p.length = length;
  p.modalities = static_cast<int>(widths.size());
  for (int m = 0; m < p.modalities; ++m) p.widths[m] = widths[m];
  p.iterations = iterations;
  p.gating = gating;
  p.released = p.projected = true;
  p.temperature = 0.1;
  return p;
}

void check_cover(const Plan& plan, const Problem& p) {
  for (const int tile : {16, 64, 96, 128}) {
    std::vector<int> seen(plan.width);
    for (int i = 0; i < modality_tiles(plan, p.modalities, tile); ++i) {
      const ModalityTile at = modality_tile(plan, i, tile);
      expect(at.columns > 0 && at.columns <= tile && at.column + at.columns <= plan.widths[at.m],
             "a tile of a modality");
      for (int c = 0; c < at.columns; ++c) ++seen[plan.offsets[at.m] + at.column + c];
    }
    for (const int n : seen) expect(n == 1, "tiles of modalities cover every column once");
  }
  for (const int parts : {1, 2, 3, 8})
    for (const int n : {0, 1, 15, 16, 17, 300}) {
      int next = 0;
      for (int part = 0; part < parts; ++part) {
        const Part of = part_of(part, parts, n, 16);
        expect(of.first == next && of.count >= 0, "parts follow one another");
        next += of.count;
      }
      expect(next == n, "parts cover all rows");
    }
}

void check_weights(const Plan& plan) {
  for (const int outputs : {1, 63, 64, 200})
    for (const int inputs : {1, 65, 130}) {
      std::vector<int> seen(outputs * (inputs + 1));
      for (int i = 0; i < weight_tiles(plan, outputs, inputs, true); ++i) {
        const WeightTile at = weight_tile(plan, outputs, inputs, i, 0);
        for (int r = 0; r < at.rows; ++r)
          for (int c = 0; c < (at.bias ? 1 : at.columns); ++c)
            ++seen[(at.row + r) * (inputs + 1) + (at.bias ? inputs : at.column + c)];
      }
      for (const int n : seen) expect(n == 1, "tiles cover every weight and bias once");
    }
}

void check_gradients(const Problem& p, const Plan& plan) {
  BackwardArguments a{};
  a.p = p;
  a.plan = plan;
  place_gradients(a);
  int64_t end = 0;
  for (int i = 0; i < ParameterIndex{p}.count(); ++i) {
    expect(a.places[i] == end && a.sizes[i] > 0, "gradients follow one another");
    end += planning::rounded(a.sizes[i], kPlaceUnit);
  }
  expect(end == plan.gradients, "the sums of a part hold all gradients");
}

// What `team_of` gives the blocks of a launch: every sample once in every step, iterations in their order.
void check_teams(const Problem& p, const Plan& plan, bool backward) {
  std::vector<int> samples(p.batch);
  const int rounds = tiles(plan.chunks, plan.teams);
  Common a{};
  a.p = p;
  a.plan = plan;
  emulator::run({plan.blocks, kWarp, 16, 0}, [&] {
    if (this_thread().index != 0) return;
    for (int round = 0; round < rounds; ++round) {
      const Team team = team_of(a, round * plan.steps + 1 + backward);
      expect(team.count <= 0 || team.t == (backward ? p.iterations - 1 : 0), "the first iteration");
      const Team last = team_of(a, (round + 1) * plan.steps - 2);
      expect(team.count <= 0 || last.t == (backward ? 0 : p.iterations - 1), "the last iteration");
      if (team.rank == 0)
        for (int i = 0; i < team.count; ++i) ++samples[team.first + i];
    }
  });
  for (const int n : samples) expect(n == 1, "teams cover every sample once");
}

void check_plans() {
  for (const int resident : {1, 7, 264})
    for (const int batch : {1, 2, 12, 65})
      for (const int length : {1, 16, 33, 300})
        for (const auto& widths : std::vector<std::vector<int>>{{1, 1}, {256, 128}, {5, 130, 64}, {3, 1, 2, 9}}) {
          const Problem p = problem_of(batch, length, widths, 3, Gating::hierarchical);
          for (const bool backward : {false, true}) {
            const Target target{2, 128, resident};
            const Plan plan = backward ? plan_backward(p, target, true) : plan_forward(p, target);
            expect(plan.blocks <= resident && plan.blocks == plan.teams * plan.team_blocks, "blocks fit");
            check_cover(plan, p);
            check_teams(p, plan, backward);
            if (backward) {
              check_weights(plan);
              check_gradients(p, plan);
            }
          }
        }
}

}  // namespace

int main() {
  try {
    check_banks();
    check_copies<BFloat16>("16-bit");
    check_copies<float>("float");
    check_plans();
  } catch (const std::exception& error) {
    std::printf("check_layout: %s\n", error.what());
    return 1;
  }
  return 0;
}
