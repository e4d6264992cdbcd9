// Hadamard noise: 32 members from one word an element, and the whole population's update from the
// same word (docs/noise.md). The tables of an update's integers are made here too.
#pragma once

#include "numeric.hpp"
#include "target.hpp"

namespace esfast::ESFAST_LANES {

// Row n of Sylvester's 32 x 32 Hadamard matrix as bits: bit k is the parity of popcount(n & k).
ESFAST_FN uint32_t hadamard_row(uint32_t n) {
  uint32_t row = 0;
  for (uint32_t k = 0; k < 32; ++k) {
    uint32_t parity = n & k;
    parity ^= parity >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    row |= (parity & 1u) << k;
  }
  return row;
}

// Binomial(32) noise of one member from the group's word: (32 - 2 popcount(w ^ row)) / sqrt(32).
// The fma is exact until it rounds, so it gives the bits of the product that the specification
// names.
template <class L>
ESFAST_FN typename L::f32 hadamard(typename L::u32 word, uint32_t row) {
  constexpr float kRoot = 0x1.6a09e6p-3f;
  const auto ones = L::from_int(L::popcount(L::xor_(word, L::set(row))));
  return L::fma(ones, L::setf(-2 * kRoot), L::setf(32 * kRoot));
}

// The sum over a word's bits of I_k * (1 - 2 * bit_k) by table: exact in int32, whatever the table.
//
// Most lane types look up 32-bit sums of `table_bits` bits at a time. One with `byte_tables` looks
// up a nibble of each of a word's four bytes at once, in tables of 64 bytes (place << 4 | nibble).
// There a nibble's sum is least + 2 * u, and u, at most 4 * 16256, takes two bytes: the dot-product
// instruction adds the four places up. 13 operations for 16 words, where 32-bit sums take 23.
template <class L>
struct HadamardTables {
  static constexpr int steps = (32 + L::table_bits - 1) / L::table_bits;
  static constexpr int words = L::byte_tables ? 64 : steps << L::table_bits;  // int32, a group

  // Tables of one group's 32 integers; returns what every sum over them starts from.
  static int32_t fill(const int32_t* coefficients, int32_t* tables) {
    if (L::byte_tables) return fill_bytes(coefficients, reinterpret_cast<uint8_t*>(tables));
    for (int j = 0; j < steps; ++j)
      for (uint32_t v = 0; v < 1u << L::table_bits; ++v)
        *tables++ = signed_sum(coefficients, j * L::table_bits, L::table_bits, v);
    return 0;
  }

  ESFAST_FN typename L::u32 add(typename L::u32 sum, typename L::u32 word, const int32_t* tables) {
    if constexpr (L::byte_tables) {
      return L::add_nibbles(sum, word, reinterpret_cast<const uint8_t*>(tables));
    } else {
      ESFAST_UNROLL
      for (int j = 0; j < steps; ++j) {
        sum = L::add(sum, L::lookup(tables + (j << L::table_bits), word));
        if (j + 1 < steps) word = L::template shr<L::table_bits>(word);
      }
      return sum;
    }
  }

 private:
  static int32_t signed_sum(const int32_t* coefficients, int first, int bits, uint32_t signs) {
    int32_t sum = 0;
    for (int k = first; k < first + bits && k < 32; ++k, signs >>= 1)
      sum += signs & 1 ? -coefficients[k] : coefficients[k];
    return sum;
  }

  // Four tables: the lower and the upper byte of u, for the lower nibbles, then for the upper ones.
  static int32_t fill_bytes(const int32_t* coefficients, uint8_t* tables) {
    int32_t base = 0;
    for (int nibble = 0; nibble < 8; ++nibble) {
      int32_t least = 0;
      for (int k = 4 * nibble; k < 4 * nibble + 4; ++k)
        least -= coefficients[k] < 0 ? -coefficients[k] : coefficients[k];
      base += least;
      uint8_t* lower = tables + nibble % 2 * 128 + nibble / 2 * 16;
      for (uint32_t v = 0; v < 16; ++v) {
        const int32_t u = (signed_sum(coefficients, 4 * nibble, 4, v) - least) / 2;
        lower[v] = static_cast<uint8_t>(u);
        lower[v + 64] = static_cast<uint8_t>(u >> 8);
      }
    }
    return base;
  }
};

}  // namespace esfast::ESFAST_LANES
