// The chosen experts' matrices times vectors, Q6_K (gemv_q6kw_moe_id_f32):
//
//     out[p, o] = sum_d w[ids[p], o, d] * x[p / SHARE, d],   w = d * sc * (q - 32);   0 where ids[p] is no expert
//
// Planes of jmoe/formats/q6_k.py, row after row:
//     codes   u32 [E, O, D/8]    low four bits; byte j of 32 holds weight j of 64 (low nibble) and j + 32 (high nibble)
//     high    u32 [E, O, D/16]   high two bits; byte j of 32 holds weights j, j + 32, j + 64, j + 96 of 128, low bits first
//     scales  s8  [E, D/16, O]   sc
//     d       u16 [E, D/256, O]  f16 bits
//     x       f32 [P/SHARE, D]
//     ids     i32 [P]
//     out     f32 [P, O]
//
// A body for mlx.core.fast.metal_kernel; E, O, D, SHARE and ROWS are template arguments. A simdgroup makes ROWS outputs of
// one pair. Of the 32 words of codes in a super-block's row, a lane takes one: four weights, and the four 32 after them.

const uint lane = thread_index_in_simdgroup;
const uint pair = thread_position_in_grid.y;
const uint first_row = thread_position_in_grid.x / 32 * ROWS;
const int expert = ids[pair];
float sums[ROWS] = {};

// All lanes of a simdgroup have one pair: they reach simd_sum together.
if (expert >= 0 && expert < E) {
    const uint quarter = lane / 8, within = lane % 8 * 4;
    for (uint block = 0; block < D / 256; ++block) {
        const size_t column = size_t(pair / SHARE) * D + block * 256 + quarter * 64 + within;
        float low_x[4], high_x[4];
        for (uint i = 0; i < 4; ++i) {
            low_x[i] = x[column + i];
            high_x[i] = x[column + 32 + i];
        }
        for (uint r = 0; r < ROWS; ++r) {
            // A row past the last one is computed from the last one, and not stored.
            const uint row = first_row + r < O ? first_row + r : O - 1;
            const uint word = codes[(size_t(expert) * O + row) * (D / 8) + block * 32 + lane];
            // 128 weights share 32 bytes of high bits; the second 64 of them have the upper half of each byte.
            const uint top = high[(size_t(expert) * O + row) * (D / 16) + block * 16 + quarter / 2 * 8 + lane % 8] >>
                             quarter % 2 * 4;
            float low_dot = 0, high_dot = 0;
            for (uint i = 0; i < 4; ++i) {
                low_dot += low_x[i] * float(int((word >> (8 * i) & 15) | (top >> (8 * i) & 3) << 4) - 32);
                high_dot += high_x[i] * float(int((word >> (8 * i + 4) & 15) | (top >> (8 * i + 2) & 3) << 4) - 32);
            }
            const size_t super = (size_t(expert) * (D / 256) + block) * O + row;
            const size_t sub = (size_t(expert) * (D / 16) + block * 16 + quarter * 4 + within / 16) * O + row;
            sums[r] += float(as_type<half>(d[super])) * (scales[sub] * low_dot + scales[sub + 2 * O] * high_dot);
        }
    }
}
for (uint r = 0; r < ROWS; ++r) {
    const float sum = metal::simd_sum(sums[r]);
    if (lane == 0 && first_row + r < O) {
        out[size_t(pair) * O + first_row + r] = sum;
    }
}
