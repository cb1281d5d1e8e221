// Memory of large results, kept for the next one. Fresh pages cost more than the kernels that write them: 64 MiB took
// 90 to 150 ms to fault in on a virtual machine, 3 to 7 ms to overwrite. Kept blocks are marked as free (MADV_FREE), so that
// the system takes their pages back when it runs short. Every call holds the GIL, which serves as the pool's lock.
#pragma once
#if defined(__linux__)
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rk {

constexpr int64_t HUGE_PAGE = 2 << 20;

struct Block {
    char* data;
    int64_t bytes;
};

class Pool {
  public:
    // A kept block of the size, or one at most an eighth larger; else fresh memory, aligned to huge pages.
    Block take(int64_t bytes) {
        bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        auto best = kept_.end();
        for (auto block = kept_.begin(); block != kept_.end(); ++block)
            if (block->bytes >= bytes && block->bytes <= bytes + bytes / 8 &&
                (best == kept_.end() || block->bytes <= best->bytes))
                best = block;
        if (best == kept_.end()) return map(bytes);
        const Block block = *best;
        kept_.erase(best);
        kept_bytes_ -= block.bytes;
        return block;
    }

    void give(Block block) {
        kept_.push_back(block);
        kept_bytes_ += block.bytes;
#ifdef MADV_FREE
        madvise(block.data, (size_t)block.bytes, MADV_FREE);
#endif
        trim();
    }

    // Sets how many bytes may be kept, and returns the bound before. What is above it goes back to the system, the
    // longest unused first.
    int64_t limit(int64_t bytes) {
        std::swap(limit_, bytes);
        trim();
        return bytes;
    }

    int64_t kept_bytes() const { return kept_bytes_; }

  private:
    static Block map(int64_t bytes) {
        const size_t room = (size_t)(bytes + HUGE_PAGE);
        void* address = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (address == MAP_FAILED) throw std::bad_alloc();
        char* const begin = (char*)address;
        char* const data = begin + (HUGE_PAGE - (int64_t)((uintptr_t)begin % HUGE_PAGE)) % HUGE_PAGE;
        if (data > begin) munmap(begin, (size_t)(data - begin));
        munmap(data + bytes, (size_t)(begin + room - (data + bytes)));
#ifdef MADV_HUGEPAGE
        madvise(data, (size_t)bytes, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
        return {data, bytes};
    }

    void trim() {
        size_t gone = 0;
        for (; gone < kept_.size() && kept_bytes_ > limit_; ++gone) {
            munmap(kept_[gone].data, (size_t)kept_[gone].bytes);
            kept_bytes_ -= kept_[gone].bytes;
        }
        kept_.erase(kept_.begin(), kept_.begin() + (int64_t)gone);
    }

    std::vector<Block> kept_;  // the longest unused first
    int64_t kept_bytes_ = 0, limit_ = 0;
};

// Never destroyed: a result may outlive the module.
inline Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
}

// A block as Python sees it, through the buffer protocol; it returns to the pool with its last reference.
class Buffer {
  public:
    explicit Buffer(int64_t bytes) : size_(bytes), block_(pool().take(bytes)) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { pool().give(block_); }
    pybind11::buffer_info info() { return {block_.data, 1, "B", 1, {size_}, {1}}; }

  private:
    int64_t size_;
    Block block_;
};

// The class is the module's own: a process may load several copies of the package.
inline void bind_pool(pybind11::module_& module) {
    using namespace pybind11;
    class_<Buffer>(module, "Buffer", buffer_protocol(), module_local(), "Uninitialised bytes from the pool.")
        .def(init<int64_t>())
        .def_buffer(&Buffer::info);
    module.def("keep", [](int64_t bytes) { return pool().limit(bytes); },
               "Set how many bytes of freed buffers the pool keeps; returns the bound before.");
    module.def("kept", [] { return pool().kept_bytes(); }, "Bytes of freed buffers that the pool keeps now.");
}

}  // namespace rk
#endif
