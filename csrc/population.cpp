// Terms of an update (population.hpp), in double and in member order.
#define ESFAST_LANES scalar
#include "population.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "lanes/scalar.hpp"

namespace esfast {

namespace {

struct Term {
  MemberSpec member;
  float coefficient;
};

// Neighbours that share their noise are one term: signed coefficients added in double, then fp32.
std::vector<Term> merge(Noise noise, const std::vector<MemberSpec>& members,
                        const std::vector<double>& coefficients) {
  std::vector<Term> terms;
  for (size_t n = 0; n < members.size();) {
    const MemberSpec& first = members[n];
    double sum = first.sign * coefficients[n];  // not 0 + that, which would lose the sign of -0
    for (++n; n < members.size() && members[n].seed == first.seed &&
              (noise != Noise::hadamard || members[n].index == first.index);
         ++n)
      sum += members[n].sign * coefficients[n];
    terms.push_back({first, static_cast<float>(sum)});
  }
  return terms;
}

using Group = std::vector<double>;  // G_k of one group, k = 0..31

std::vector<Group> sum_groups(const std::vector<Term>& terms, std::vector<Source>& sources) {
  std::vector<Group> groups;
  for (const Term& term : terms) {
    const Source source = make_source(Noise::hadamard, term.member);
    if (groups.empty() || sources.back().purpose != source.purpose) {
      sources.push_back(source);
      groups.emplace_back(32, 0.0);
    }
    for (uint32_t k = 0; k < 32; ++k) {
      const double sign = source.row >> k & 1u ? -1.0 : 1.0;
      groups.back()[k] += static_cast<double>(term.coefficient) * sign;
    }
  }
  for (Group& group : groups)
    for (double& g : group) g /= std::sqrt(32.0);
  return groups;
}

// Two int8 digits, 127 * 128, for the largest: any order, table or dot product gives these bits.
void quantise(const std::vector<Group>& groups, Terms& out) {
  constexpr double kLevels = 16256.0;
  double q = 0.0;
  for (const Group& group : groups)
    for (double g : group) q = std::max(q, std::fabs(g));
  out.hadamard_scale = static_cast<float>(q / kLevels);
  for (const Group& group : groups)
    for (double g : group)
      out.hadamard_coefficients.push_back(
          q == 0.0 ? 0 : static_cast<int32_t>(std::rint(g / q * kLevels)));
}

Terms make_hadamard_terms(std::vector<Term> terms) {
  constexpr size_t kMostGroups = 4128;  // 16256 * 32 * groups stays below 2^31
  std::stable_sort(terms.begin(), terms.end(),
                   [](const Term& a, const Term& b) { return a.member.index < b.member.index; });
  for (const Term& term : terms)
    if (term.member.seed != terms.front().member.seed)
      throw std::invalid_argument(
          "Hadamard members of one update have different seeds; they share their generation's "
          "seed and differ in index. Update once a generation.");
  Terms out;
  const std::vector<Group> groups = sum_groups(terms, out.sources);
  if (groups.size() > kMostGroups)
    throw std::invalid_argument("the update has " + std::to_string(groups.size()) +
                                " Hadamard groups of 32 members; at most 4128 fit an exact int32 "
                                "sum. Use a smaller population, or gaussian noise.");
  quantise(groups, out);
  return out;
}

}  // namespace

Noise noise_of(int number) {
  if (number < 0 || number >= kNoises)
    throw std::invalid_argument("the core has " + std::to_string(kNoises) +
                                " noises and got number " + std::to_string(number) +
                                "; build it again, with a value of Noise in csrc/segments.hpp for "
                                "each name in NOISES of esfast/members.py");
  return static_cast<Noise>(number);
}

Source make_source(Noise noise, const MemberSpec& member) {
  if (noise != Noise::hadamard) return {member.seed, 0u, 0u, 0.0f};
  return {member.seed, member.index / 32u, scalar::hadamard_row(member.index % 32u), 0.0f};
}

Terms make_terms(Noise noise, const std::vector<MemberSpec>& members,
                 const std::vector<double>& coefficients) {
  std::vector<Term> terms = merge(noise, members, coefficients);
  if (noise == Noise::hadamard) return make_hadamard_terms(std::move(terms));
  Terms out;
  for (const Term& term : terms) {
    out.sources.push_back(make_source(noise, term.member));
    out.sources.back().coefficient = term.coefficient;
  }
  return out;
}

void philox(uint64_t key, const uint32_t counter[4], uint32_t words[4]) {
  const scalar::Stream s = scalar::make_stream(key, counter[1], counter[2], counter[3]);
  uint32_t out[1][4];
  scalar::philox<scalar::Scalar, 1>(s, counter[0], out);
  std::copy(out[0], out[0] + 4, words);
}

uint64_t derive_seed(uint64_t run_seed, uint64_t generation, uint32_t member) {
  const uint32_t counter[4] = {static_cast<uint32_t>(generation),
                               static_cast<uint32_t>(generation >> 32), member, kPurposeSeed};
  uint32_t words[4];
  philox(run_seed, counter, words);
  return static_cast<uint64_t>(words[1]) << 32 | words[0];
}

}  // namespace esfast
