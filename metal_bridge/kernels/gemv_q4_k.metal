// The chosen experts' matrices times vectors, Q4_K (gemv_q4kw_moe_id_f32):
//
//     out[p, o] = sum_d w[ids[p], o, d] * x[p / SHARE, d],   w = d * sc * q - dmin * m;   0 where ids[p] is no expert
//
// Planes of jmoe/formats/q4_k.py, row after row:
//     codes   u32 [E, O, D/8]    as bytes: byte j of 32 holds weight j of 64 in its low, weight j + 32 in its high bits
//     scales  u8  [E, D/32, O]   sc
//     mins    u8  [E, D/32, O]   m
//     d       u16 [E, D/256, O]  f16 bits
//     dmin    u16 [E, D/256, O]  f16 bits
//     x       f32 [P/SHARE, D]
//     ids     i32 [P]
//     out     f32 [P, O]
//
// A body for mlx.core.fast.metal_kernel; E, O, D, SHARE and ROWS are template arguments. A simdgroup makes ROWS outputs of
// one pair. Of the 32 words of a super-block's row, a lane takes one: four weights of one sub-block and four of the next.

const uint lane = thread_index_in_simdgroup;
const uint pair = thread_position_in_grid.y;
const uint first_row = thread_position_in_grid.x / 32 * ROWS;
const int expert = ids[pair];
float sums[ROWS] = {};

// All lanes of a simdgroup have one pair: they reach simd_sum together.
if (expert >= 0 && expert < E) {
    const uint quarter = lane / 8;
    for (uint block = 0; block < D / 256; ++block) {
        const size_t column = size_t(pair / SHARE) * D + block * 256 + quarter * 64 + lane % 8 * 4;
        float low_x[4], high_x[4], low_sum = 0, high_sum = 0;
        for (uint i = 0; i < 4; ++i) {
            low_x[i] = x[column + i];
            high_x[i] = x[column + 32 + i];
            low_sum += low_x[i];
            high_sum += high_x[i];
        }
        for (uint r = 0; r < ROWS; ++r) {
            // A row past the last one is computed from the last one, and not stored.
            const uint row = first_row + r < O ? first_row + r : O - 1;
            const uint word = codes[(size_t(expert) * O + row) * (D / 8) + block * 32 + lane];
            float low_dot = 0, high_dot = 0;
            for (uint i = 0; i < 4; ++i) {
                low_dot += low_x[i] * float(word >> (8 * i) & 15);
                high_dot += high_x[i] * float(word >> (8 * i + 4) & 15);
            }
            const size_t super = (size_t(expert) * (D / 256) + block) * O + row;
            const size_t sub = (size_t(expert) * (D / 32) + block * 8 + quarter * 2) * O + row;
            sums[r] += float(as_type<half>(d[super])) * (scales[sub] * low_dot + scales[sub + O] * high_dot) -
                       float(as_type<half>(dmin[super])) * (mins[sub] * low_sum + mins[sub + O] * high_sum);
        }
    }
}
for (uint r = 0; r < ROWS; ++r) {
    const float sum = metal::simd_sum(sums[r]);
    if (lane == 0 && first_row + r < O) {
        out[size_t(pair) * O + first_row + r] = sum;
    }
}
